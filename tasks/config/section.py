"""What all sections of a config are made of."""

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Ratio = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]

SECRET = re.compile(r"token|secret|password|passwd|api_?key|credential", re.IGNORECASE)
"""Names of values that are kept nowhere: a config is a parameter of Prefect and a record of every stage."""


class ConfigError(ValueError):
    """A config that a user can mend; the message says how."""


class Section(BaseModel):
    """A part of the tree: unknown keys are errors, which show no value; values never change after loading.

    A default is validated as what is set is: a stage made with it is then the one made with the value written out, as a
    deployment does with all of a config.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, hide_input_in_errors=True, validate_default=True
    )
