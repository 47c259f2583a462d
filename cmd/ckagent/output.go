package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

// schema names the version of an object's form.
func schema(kind string) string { return "ckagent." + kind + "/1" }

// print writes an object as one line of JSON. It is called once per object;
// what cannot be written to stdout has nobody to read it.
func (a *app) print(kind string, v any) {
	enc := json.NewEncoder(a.out)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		fmt.Fprintf(a.err, "ckagent: print %s: %v\n", kind, err)
	}
}

// table prints rows with aligned columns.
func (a *app) table(header []string, rows [][]string) { writeTable(a.out, header, rows) }

func writeTable(out io.Writer, header []string, rows [][]string) {
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, strings.Join(header, "\t"))
	for _, r := range rows {
		fmt.Fprintln(w, strings.Join(r, "\t"))
	}
	_ = w.Flush() // stdout is gone: nobody to tell
}

// sizeText is a byte count for people.
func sizeText(n uint64) string {
	const units = "KMGTP"
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, u := float64(n)/1024, 0
	for v >= 1024 && u < len(units)-1 {
		v, u = v/1024, u+1
	}
	return fmt.Sprintf("%.1f %ciB", v, units[u])
}

// durationText is a duration for people: three digits.
func durationText(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return d.Round(time.Microsecond).String()
	case d < time.Second:
		return d.Round(10 * time.Microsecond).String()
	default:
		return d.Round(10 * time.Millisecond).String()
	}
}

// isTerminal reports whether progress may redraw a line.
func isTerminal(f any) bool {
	file, ok := f.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(file.Fd()), unix.TCGETS)
	return err == nil
}

// bar is progress on stderr: a bar on a terminal, a line per tenth otherwise.
type bar struct {
	a     *app
	what  string
	tty   bool
	tenth uint64
}

func (a *app) newBar(what string) *bar { return &bar{a: a, what: what, tty: isTerminal(a.err)} }

func (b *bar) update(done, total uint64) {
	if total == 0 {
		return
	}
	tenth := done * 10 / total
	if !b.tty {
		if tenth != b.tenth {
			b.tenth = tenth
			fmt.Fprintf(b.a.err, "%s: %d %%\n", b.what, tenth*10)
		}
		return
	}
	full := int(done * 40 / total)
	fmt.Fprintf(b.a.err, "\r%s [%s%s] %3d %%", b.what, strings.Repeat("#", full), strings.Repeat("-", 40-full), done*100/total)
	if done >= total {
		fmt.Fprintln(b.a.err)
	}
}
