package heatmap

import (
	"bytes"
	"image/png"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func example() Map {
	ram := Block{Name: "pc.ram", Bytes: 512 << 20, RegionBytes: 2 << 20, Heat: make([]float64, 256)}
	for i := 100; i < 116; i++ {
		ram.Heat[i] = 1000
	}
	ram.Heat[200] = 1.5
	return Map{Unit: "pages/s", Blocks: []Block{ram, {Name: "vga.vram", Bytes: 16 << 20, RegionBytes: 2 << 20, Heat: make([]float64, 8)}}}
}

// TestText: the buffer is where it lies, and nowhere else.
func TestText(t *testing.T) {
	var b bytes.Buffer
	if err := example().Text(&b); err != nil {
		t.Fatal(err)
	}
	t.Logf("\n%s", b.String())
	var cells []rune
	for line := range strings.Lines(b.String()) {
		if first, rest, ok := strings.Cut(line, "|"); ok && strings.TrimSpace(first) != "" {
			row, _, _ := strings.Cut(rest, "|")
			cells = append(cells, []rune(row)...)
		}
	}
	if len(cells) != 256 {
		t.Fatalf("%d cells", len(cells))
	}
	for i, c := range cells {
		want := ' '
		switch {
		case i >= 100 && i < 116:
			want = '█'
		case i == 200:
			want = '·'
		}
		if c != want {
			t.Errorf("cell %d is %q, want %q", i, c, want)
		}
	}
	if !strings.Contains(b.String(), "not written: vga.vram") {
		t.Error("the cold block is not named")
	}
}

// TestLargeMemory: the map of 1 TiB fits the terminal.
func TestLargeMemory(t *testing.T) {
	m := Map{Unit: "pages/s", Blocks: []Block{{Name: "ram", Bytes: 1 << 40, RegionBytes: 2 << 20, Heat: make([]float64, 1<<19)}}}
	m.Blocks[0].Heat[1<<18] = 5
	var b bytes.Buffer
	if err := m.Text(&b); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(b.String(), "\n"); n > maxRows+4 {
		t.Errorf("%d lines", n)
	}
}

func TestPNG(t *testing.T) {
	var b bytes.Buffer
	if err := example().PNG(&b); err != nil {
		t.Fatal(err)
	}
	img, err := png.Decode(&b)
	if err != nil {
		t.Fatal(err)
	}
	at := func(region int) uint32 {
		x, y := place(region, gap)
		r, g, bl, _ := img.At(x+3, y+3).RGBA()
		return r + g + bl
	}
	if !(at(105) > at(200) && at(200) > at(0)) {
		t.Errorf("hot %d, warm %d, cold %d", at(105), at(200), at(0))
	}
}

func TestNothingWritten(t *testing.T) {
	m := Map{Unit: "pages/s", Blocks: []Block{{Name: "ram", Bytes: 4096, RegionBytes: 2 << 20, Heat: []float64{0}}}}
	var b bytes.Buffer
	if err := m.Text(&b); err != nil || !strings.Contains(b.String(), "not written: ram") {
		t.Errorf("%v %q", err, b.String())
	}
	if err := m.PNG(&b); err != nil {
		t.Error(err)
	}
}
