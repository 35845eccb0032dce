"""Flow maps and adapters: exact, learned, wrapped, latent.

Every kind of adapter is imported here, so that each has entered itself in ``Adapter.FORMS`` before one is loaded.
"""

import invflow.models.spectral_adapter  # noqa: F401
