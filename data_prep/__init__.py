"""Raw rows to blended, leak-free, tokenised sets; knows nothing of tasks or config."""
