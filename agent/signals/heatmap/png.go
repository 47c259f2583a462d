package heatmap

import (
	"fmt"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"io"
	"math"

	"golang.org/x/image/font"
	"golang.org/x/image/font/basicfont"
	"golang.org/x/image/math/fixed"
)

// Pixels. The font's characters are 7 wide and 13 high.
const (
	cell    = 10
	gap     = 8
	line    = 16  // of text
	margin  = 80  // left of the cells, for offsets
	pngRows = 256 // per block
	marked  = 8   // every so many rows have their offset beside them
)

var (
	background = color.RGBA{24, 24, 28, 255}
	ink        = color.RGBA{200, 200, 205, 255}
)

// PNG writes the map as a picture: blocks from top to bottom with the offsets of
// their rows, the scale below. Of blocks in which nothing was written only those as
// large as a row are shown.
func (m Map) PNG(w io.Writer) error {
	top := m.top(pngRows)
	type part struct {
		title string
		cells []float64
		step  uint64 // bytes a row
		y     int
	}
	var parts []part
	y := gap
	for _, b := range m.Blocks {
		c, per := cells(b, pngRows)
		if !touched(c) && len(c) < Columns {
			continue
		}
		parts = append(parts, part{title(b, per), c, b.RegionBytes * uint64(per) * Columns, y})
		y += line + (len(c)+Columns-1)/Columns*cell + gap
	}
	img := image.NewRGBA(image.Rect(0, 0, margin+Columns*cell+gap, y+cell+line+gap))
	fill(img, img.Bounds(), background)
	for _, p := range parts {
		write(img, margin, p.y, p.title)
		for i, h := range p.cells {
			x, y := place(i, p.y)
			fill(img, image.Rect(x, y, x+cell-1, y+cell-1), warmth(level(h, top, 255)))
			if i%(Columns*marked) == 0 {
				write(img, gap, y-3, fmt.Sprintf("%9s", sizeText(uint64(i/Columns)*p.step)))
			}
		}
	}
	for i := range Columns {
		x := margin + i*cell
		fill(img, image.Rect(x, y, x+cell, y+cell), warmth(1+i*254/(Columns-1)))
	}
	low, high := fmt.Sprintf("<= %.3g", top/math.Pow10(decades)), fmt.Sprintf("%.3g %s a cell", top, m.Unit)
	write(img, margin, y+cell, low)
	write(img, margin+Columns*cell-7*len(high), y+cell, high)
	return png.Encode(w, img)
}

// place is where a cell of a block lies whose title begins at y.
func place(i, y int) (int, int) {
	return margin + i%Columns*cell, y + line + i/Columns*cell
}

// write puts a line of text below y.
func write(img draw.Image, x, y int, text string) {
	d := font.Drawer{Dst: img, Src: image.NewUniform(ink), Face: basicfont.Face7x13, Dot: fixed.P(x, y+12)}
	d.DrawString(text)
}

func fill(img *image.RGBA, r image.Rectangle, c color.RGBA) {
	for y := r.Min.Y; y < r.Max.Y; y++ {
		for x := r.Min.X; x < r.Max.X; x++ {
			img.SetRGBA(x, y, c)
		}
	}
}

// warmth goes from dark grey (0: nothing) by blue, red and yellow to white.
func warmth(l int) color.RGBA {
	stops := []color.RGBA{{30, 40, 120, 255}, {150, 40, 150, 255}, {225, 70, 50, 255}, {250, 190, 40, 255}, {255, 255, 235, 255}}
	if l <= 0 {
		return color.RGBA{45, 45, 50, 255}
	}
	x := float64(min(l, 255)-1) / 254 * float64(len(stops)-1)
	i := min(int(x), len(stops)-2)
	f := x - float64(i)
	mix := func(a, b uint8) uint8 { return uint8(float64(a) + f*(float64(b)-float64(a))) }
	a, b := stops[i], stops[i+1]
	return color.RGBA{mix(a.R, b.R), mix(a.G, b.G), mix(a.B, b.B), 255}
}
