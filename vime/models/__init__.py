"""Model families. Importing the package registers vime's families, so that ModelConfig can be read anywhere."""

from vime.models import families as families
