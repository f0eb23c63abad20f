"""Before any test imports torch"""

import media  # noqa: F401  how OpenMP's threads wait
