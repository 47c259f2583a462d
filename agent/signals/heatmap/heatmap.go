package heatmap

import (
	"fmt"
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

// decades of heat below the top that the scale shows; what is less looks like its
// lower end.
const decades = 3

// level maps heat to 0 (nothing) or 1..n, the lowest of the scale being 1.
func level(h, top float64, n int) int {
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
		fmt.Fprintln(&b, title(bl, per))
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

// title is the line above a block's cells.
func title(b Block, per int) string {
	return fmt.Sprintf("%s, %s, %s a cell", b.Name, sizeText(b.Bytes), sizeText(b.RegionBytes*uint64(per)))
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
