package report

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// Point of a series; Y must be positive on a logarithmic axis.
type Point struct{ X, Y float64 }

// Series is one line or one set of spikes.
type Series struct {
	Name   string
	Points []Point
}

// Chart is a picture with one pair of axes. Y is logarithmic: what is compared
// here differs by orders of magnitude.
type Chart struct {
	Title  string
	XLabel string
	YLabel string
	Series []Series
	Spikes bool // vertical lines from the bottom instead of lines between points
}

var colours = []string{"#1b6ca8", "#c0392b", "#7f8c8d", "#27ae60", "#8e44ad"}

const (
	svgWidth, svgHeight            = 720.0, 400.0
	padLeft, padRight, padTop, pad = 72.0, 24.0, 48.0, 56.0
)

// SVG draws the chart. Points that cannot be drawn (NaN, not positive) are left
// out; without any the picture says so.
func (c Chart) SVG() string {
	minX, maxX, minY, maxY := math.Inf(1), math.Inf(-1), math.Inf(1), math.Inf(-1)
	for _, s := range c.Series {
		for _, p := range s.Points {
			if drawable(p) {
				minX, maxX = min(minX, p.X), max(maxX, p.X)
				minY, maxY = min(minY, p.Y), max(maxY, p.Y)
			}
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %g %g" font-family="sans-serif" font-size="12">`+"\n", svgWidth, svgHeight)
	fmt.Fprintf(&b, `<rect width="%g" height="%g" fill="#fff"/>`+"\n", svgWidth, svgHeight)
	text := func(x, y float64, anchor, s string) {
		fmt.Fprintf(&b, `<text x="%.1f" y="%.1f" text-anchor="%s">%s</text>`+"\n", x, y, anchor, html.EscapeString(s))
	}
	fmt.Fprintf(&b, `<text x="%g" y="24" text-anchor="middle" font-size="15">%s</text>`+"\n", svgWidth/2, html.EscapeString(c.Title))
	if math.IsInf(minX, 1) {
		text(svgWidth/2, svgHeight/2, "middle", "nothing was measured")
		b.WriteString("</svg>\n")
		return b.String()
	}
	if minX == maxX {
		minX, maxX = minX-1, maxX+1
	}
	lowY, highY := math.Floor(math.Log10(minY)), math.Ceil(math.Log10(maxY))
	if lowY == highY {
		highY++
	}
	x := func(v float64) float64 { return padLeft + (v-minX)/(maxX-minX)*(svgWidth-padLeft-padRight) }
	y := func(v float64) float64 {
		return svgHeight - pad - (math.Log10(v)-lowY)/(highY-lowY)*(svgHeight-padTop-pad)
	}
	for d := lowY; d <= highY; d++ {
		at := y(math.Pow(10, d))
		fmt.Fprintf(&b, `<line x1="%g" y1="%.1f" x2="%g" y2="%.1f" stroke="#ddd"/>`+"\n", padLeft, at, svgWidth-padRight, at)
		text(padLeft-6, at+4, "end", fmt.Sprintf("%g", math.Pow(10, d)))
	}
	const ticks = 6
	for i := range ticks + 1 {
		v := minX + (maxX-minX)*float64(i)/ticks
		text(x(v), svgHeight-pad+18, "middle", digits(v))
	}
	text(svgWidth/2, svgHeight-12, "middle", c.XLabel)
	fmt.Fprintf(&b, `<text transform="translate(16 %g) rotate(-90)" text-anchor="middle">%s</text>`+"\n", svgHeight/2, html.EscapeString(c.YLabel))
	for i, s := range c.Series {
		colour := colours[i%len(colours)]
		var path strings.Builder
		for _, p := range s.Points {
			if !drawable(p) {
				continue
			}
			switch {
			case c.Spikes:
				fmt.Fprintf(&path, "M%.1f %.1fV%.1f", x(p.X), svgHeight-pad, y(p.Y))
			case path.Len() == 0:
				fmt.Fprintf(&path, "M%.1f %.1f", x(p.X), y(p.Y))
			default:
				fmt.Fprintf(&path, "L%.1f %.1f", x(p.X), y(p.Y))
			}
			if !c.Spikes {
				fmt.Fprintf(&b, `<circle cx="%.1f" cy="%.1f" r="3.5" fill="%s"/>`+"\n", x(p.X), y(p.Y), colour)
			}
		}
		if path.Len() > 0 {
			fmt.Fprintf(&b, `<path d="%s" fill="none" stroke="%s" stroke-width="1.6"/>`+"\n", path.String(), colour)
		}
		at := padTop + 2 + 16*float64(i)
		fmt.Fprintf(&b, `<rect x="%g" y="%.1f" width="12" height="4" fill="%s"/>`+"\n", padLeft+10, at-5, colour)
		text(padLeft+28, at, "start", s.Name)
	}
	b.WriteString("</svg>\n")
	return b.String()
}

func drawable(p Point) bool { return p.Y > 0 && !math.IsNaN(p.X) && !math.IsInf(p.Y, 1) }
