"""Model families. Importing the package registers those of vime, so that a ModelConfig can be read anywhere."""

from vime.models import families as families
