package main

import (
	"image/color"
	"os"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// A panel compares latencies of some workloads.
type panel struct {
	title string
	of    func(sample) float64
}

var panels = []panel{
	{"median latency of a fault, C = 1", latencies[0].of},
	{"99th percentile, C = 1", latencies[1].of},
}

var colors = map[string]color.RGBA{
	"uffd":  {R: 0x00, G: 0x7d, B: 0x9c, A: 0xff},
	"pager": {R: 0xce, G: 0x32, B: 0x62, A: 0xff},
}

// drawPlot draws, for each workload, the medians of the ratios, and bars for where half
// of them lie.
func drawPlot(name string, f *file, all []*workload) error {
	var shown []*workload
	for _, w := range all {
		if r := f.find(w.name); r != nil && w.short != "" {
			shown = append(shown, w)
		}
	}
	const width, height = 24 * vg.Centimeter, 20 * vg.Centimeter
	svg := vgsvg.New(width, height)
	tiles := draw.Tiles{Rows: len(panels), Cols: 1, PadTop: 5, PadBottom: 5, PadLeft: 5, PadRight: 5, PadY: 12}
	grid := make([][]*plot.Plot, len(panels))
	for i, p := range panels {
		drawn, err := p.plot(f, shown)
		if err != nil {
			return err
		}
		grid[i] = []*plot.Plot{drawn}
	}
	canvas := draw.New(svg)
	canvas.SetColor(color.White)
	canvas.Fill(canvas.Rectangle.Path())
	for i, row := range plot.Align(grid, tiles, canvas) {
		grid[i][0].Draw(row[0])
	}
	out, err := os.Create(name)
	if err != nil {
		return err
	}
	if _, err := svg.WriteTo(out); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}

func (p panel) plot(f *file, shown []*workload) (*plot.Plot, error) {
	drawn := plot.New()
	drawn.Title.Text = p.title
	drawn.Y.Min = 0
	drawn.Legend.Top, drawn.Legend.Left = true, true
	names := make([]string, len(shown))
	for i, w := range shown {
		names[i] = w.short
	}
	drawn.NominalX(names...)
	drawn.Add(plotter.NewGrid())
	for at, server := range []string{"uffd", "pager"} {
		var points ranges
		for i, w := range shown {
			r := f.find(w.name)
			if len(r.Samples[server]) == 0 {
				continue
			}
			points = append(points, point{float64(i) + 0.2*float64(at) - 0.1, r.ratios(server, w.servers[0].name, p.of)})
		}
		if len(points) == 0 {
			continue
		}
		dots, err := plotter.NewScatter(points)
		if err != nil {
			return nil, err
		}
		dots.GlyphStyle = draw.GlyphStyle{Color: colors[server], Radius: 3, Shape: draw.CircleGlyph{}}
		bars, err := plotter.NewYErrorBars(points)
		if err != nil {
			return nil, err
		}
		bars.LineStyle.Color, bars.LineStyle.Width = colors[server], 1.5
		drawn.Add(bars, dots)
		drawn.Legend.Add(server, dots)
	}
	line := plotter.NewFunction(func(float64) float64 { return 1 })
	line.Dashes = []vg.Length{4, 3}
	drawn.Add(line)
	drawn.Y.Min = 0
	drawn.X.Min, drawn.X.Max = -0.5, float64(len(shown))-0.5
	return drawn, nil
}

// A point is a spread at an x.
type point struct {
	x float64
	y spread
}

// ranges are points with error bars for plotter.
type ranges []point

func (r ranges) Len() int                { return len(r) }
func (r ranges) XY(i int) (x, y float64) { return r[i].x, r[i].y.median }
func (r ranges) YError(i int) (low, high float64) {
	return r[i].y.median - r[i].y.low, r[i].y.high - r[i].y.median
}
