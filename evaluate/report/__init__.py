"""Pages that one file holds whole: no network, no other files, readable on a phone."""

from .pages import data_url, render_page
from .report import gallery_of, report_page

__all__ = ["data_url", "gallery_of", "render_page", "report_page"]
