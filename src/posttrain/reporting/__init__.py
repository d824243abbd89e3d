"""Parts of the report page: figures as inline SVG, the road as a picture, and the template."""

from posttrain.reporting.figures import curves, time_bars
from posttrain.reporting.road import road_svg

__all__ = ["curves", "road_svg", "time_bars"]
