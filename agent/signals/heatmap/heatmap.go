package heatmap

import (
	"fmt"
	"image"
	"image/color"
	"image/png"
	"io"
	"math"
	"strings"
)

// Block is a block of memory with the heat of its regions, all of RegionBytes but
// the last.
type Block struct {
	Name        string
	Bytes       uint64
	RegionBytes uint64
	Heat        []float64 // any unit, the same for all blocks
}

// Columns is the width of a map in cells.
const Columns = 64

// Map is a set of blocks to draw together, on one scale.
type Map struct {
	Blocks []Block
	Unit   string // what a region's heat counts: "pages/s"
}

// rows of all blocks together that a terminal shows without scrolling away.
const maxRows = 24

// cells sums regions until no more than rows rows are needed.
func cells(b Block, rows int) (out []float64, per int) {
	per = max(1, (len(b.Heat)+rows*Columns-1)/(rows*Columns))
	for i := 0; i < len(b.Heat); i += per {
		var sum float64
		for _, h := range b.Heat[i:min(i+per, len(b.Heat))] {
			sum += h
		}
		out = append(out, sum)
	}
	return out, per
}

// top is the hottest cell of all, which the scale ends at.
func (m Map) top(rows int) (top float64) {
	for _, b := range m.Blocks {
		c, _ := cells(b, rows)
		for _, h := range c {
			top = max(top, h)
		}
	}
	return top
}

// level maps heat to 0 (nothing) or 1..n, three decades below the top being 1.
func level(h, top float64, n int) int {
	const decades = 3
	if h <= 0 || top <= 0 {
		return 0
	}
	x := 1 + math.Log10(h/top)/decades
	return min(n, max(1, int(math.Ceil(x*float64(n)))))
}

var shades = []rune(" ·░▒▓█")

// Text writes the map as lines of blocks. Blocks in which nothing was written take
// one line together.
func (m Map) Text(w io.Writer) error {
	rows := max(1, maxRows/max(1, m.warm()))
	top := m.top(rows)
	var b strings.Builder
	var cold []string
	for _, bl := range m.Blocks {
		c, per := cells(bl, rows)
		if !touched(c) {
			cold = append(cold, bl.Name)
			continue
		}
		fmt.Fprintf(&b, "%s, %s, %s a cell\n", bl.Name, sizeText(bl.Bytes), sizeText(bl.RegionBytes*uint64(per)))
		for i := 0; i < len(c); i += Columns {
			row := c[i:min(i+Columns, len(c))]
			fmt.Fprintf(&b, "%9s |", sizeText(uint64(i*per)*bl.RegionBytes))
			for _, h := range row {
				b.WriteRune(shades[level(h, top, len(shades)-1)])
			}
			b.WriteString(strings.Repeat(" ", Columns-len(row)) + "|\n")
		}
	}
	if len(cold) > 0 {
		fmt.Fprintf(&b, "not written: %s\n", strings.Join(cold, ", "))
	}
	fmt.Fprintf(&b, "scale: '%s' to '%c' = %.3g %s a cell, logarithmic\n", string(shades[1:2]), shades[len(shades)-1], top, m.Unit)
	_, err := io.WriteString(w, b.String())
	return err
}

func (m Map) warm() (n int) {
	for _, b := range m.Blocks {
		if touched(b.Heat) {
			n++
		}
	}
	return n
}

func touched(c []float64) bool {
	for _, h := range c {
		if h > 0 {
			return true
		}
	}
	return false
}

const (
	cell    = 10 // pixels
	gap     = 6
	pngRows = 256 // per block
)

// PNG writes the map as a picture: blocks from top to bottom, the scale below. Of
// blocks in which nothing was written only main ones as large as a row are shown.
func (m Map) PNG(w io.Writer) error {
	top := m.top(pngRows)
	type part struct {
		cells []float64
		y     int
	}
	var parts []part
	y := gap
	for _, b := range m.Blocks {
		c, _ := cells(b, pngRows)
		if !touched(c) && len(c) < Columns {
			continue
		}
		parts = append(parts, part{c, y})
		y += (len(c)+Columns-1)/Columns*cell + gap
	}
	img := image.NewRGBA(image.Rect(0, 0, 2*gap+Columns*cell, y+cell+gap))
	fill(img, img.Bounds(), color.RGBA{24, 24, 28, 255})
	for _, p := range parts {
		for i, h := range p.cells {
			x, y := gap+i%Columns*cell, p.y+i/Columns*cell
			fill(img, image.Rect(x, y, x+cell-1, y+cell-1), warmth(level(h, top, 255)))
		}
	}
	for i := range Columns {
		x := gap + i*cell
		fill(img, image.Rect(x, y, x+cell, y+cell), warmth(i*255/(Columns-1)))
	}
	return png.Encode(w, img)
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

// sizeText is a round size for people.
func sizeText(n uint64) string {
	switch {
	case n >= 1<<30 && n%(1<<30) == 0:
		return fmt.Sprintf("%d GiB", n>>30)
	case n >= 1<<20:
		return fmt.Sprintf("%d MiB", n>>20)
	case n >= 1<<10:
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d", n)
}
