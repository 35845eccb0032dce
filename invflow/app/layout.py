"""The page: its tabs, and the width of its images. Imported only after a check that gradio is installed."""

from __future__ import annotations

import gradio as gr

from invflow.app.tab_restore import code_tab, restore_tab
from invflow.app.tabs_moving import certificate_tab, flow_tab

__all__ = ["STYLE", "build"]

#: all images have equal width, six in a row, three or two on narrow screens
STYLE = """
.picture { flex: 0 0 calc((100% - 5 * var(--layout-gap)) / 6) !important; }
.picture { min-width: 100px !important; margin: 0 !important; }
.pictures { justify-content: flex-end !important; }  /* images that belong together are aligned */
.picture img { image-rendering: pixelated; width: 100%; }
@media (max-width: 1000px) {
  .picture { flex-basis: calc((100% - 2 * var(--layout-gap)) / 3) !important; }
}
@media (max-width: 500px) {
  .picture { flex-basis: calc((100% - var(--layout-gap)) / 2) !important; }
}
"""


def build() -> gr.Blocks:
    """The whole page."""
    blocks = gr.Blocks(title="invflow", analytics_enabled=False, delete_cache=(600, 3600))
    with blocks:
        gr.Markdown("# invflow: what could be there?\nPaint a hole, or choose another kind of damage. The samples show "
                    "images that explain the measurement. Nothing leaves this machine.")
        with gr.Tab("Restore"):
            view = restore_tab()
        with gr.Tab("Flow"):
            flow_tab()
        with gr.Tab("Certificate"):
            certificate_tab()
        with gr.Tab("Code"):
            code_tab(*view)
    return blocks
