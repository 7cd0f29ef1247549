"""A page about runs, for people: what their run directories hold, as one HTML file that needs no network.

Reading order: record (reads a run directory), timeline (how the time of a run was spent, in order, and what interrupted
it), curves (figures over steps, thinned for a page), page (puts all of it into assets/page.html). assets/ also has
uPlot, which draws the curves: 50 kB, where plotly would add 4.8 MB to each page.

It may import checkpoint, telemetry, run and the modules beside the rooms. It imports no torch.
"""
