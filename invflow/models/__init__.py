"""Flow maps and adapters: exact, learned, wrapped, latent.

Importing every kind of adapter here registers each in ``Adapter.FORMS`` before one is loaded.
"""

import invflow.models.spectral_adapter  # noqa: F401
