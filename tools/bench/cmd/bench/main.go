// Command bench measures ckagent against its peers and writes the table, the
// pictures and the ratios of the run.
//
//	go run ./tools/bench/cmd/bench [-quick] [-n 30] [-only restore,checkpoint/1g-4k] [-compare] [-profile]
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/tools/bench"
	"github.com/ckagent/ckagent/tools/bench/report"
)

const (
	document = "docs/benchmarks.md"
	pictures = "docs/bench"
	ratios   = "tools/bench/ratios.tsv"
	worse    = 0.15 // by which a ratio may get worse before -compare fails
)

type flags struct {
	o       bench.Options
	only    string
	write   bool
	compare bool
	profile bool
}

func main() {
	if len(os.Args) == 3 && os.Args[1] == bench.TouchVerb {
		if err := bench.TouchMain(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, "bench: touch:", err)
			os.Exit(1)
		}
		return
	}
	var f flags
	flag.IntVar(&f.o.Rounds, "n", 30, "rounds of what is quick; what takes seconds gets a share of them, told in the table")
	flag.BoolVar(&f.o.Quick, "quick", false, "go through everything once; the figures mean little and are not written")
	flag.StringVar(&f.only, "only", "", "parts to measure, separated by commas: "+strings.Join(bench.PartNames(), " "))
	flag.StringVar(&f.o.Binary, "ckagent", "bin/ckagent", "the program to measure")
	flag.StringVar(&f.o.Memory, "memory", "/dev/shm", "directory on tmpfs for the stores")
	flag.StringVar(&f.o.Disk, "disk", os.TempDir(), "directory on a disk for the part that waits for one")
	flag.BoolVar(&f.compare, "compare", false, "compare with the committed ratios and fail if one got worse by more than 15 %")
	flag.BoolVar(&f.profile, "profile", false, "print what each stage costs")
	flag.BoolVar(&f.write, "write", true, "write "+document+", "+pictures+" and "+ratios+" (whole runs only)")
	flag.Parse()
	if flag.NArg() > 0 || f.o.Rounds < 1 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	err := run(ctx, f)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, f flags) error {
	root, err := moduleRoot()
	if err != nil {
		return err
	}
	if err := os.Chdir(root); err != nil {
		return err
	}
	if f.only != "" {
		f.o.Only = strings.Split(f.only, ",")
	}
	f.o.Source = "tools/bench/cwp/cwp.c"
	began := time.Now()
	f.o.Log = func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "[%4.0fs] %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
	}
	old, err := readRatios()
	if err != nil {
		return err
	}
	out, err := bench.Run(ctx, f.o)
	if err != nil {
		return err
	}
	fmt.Printf("%s\n%s", out.Machine, report.Markdown(append(report.Goals(out.Rows), out.Rows...)))
	if f.profile {
		fmt.Print(out.Profile)
	}
	whole := len(f.o.Only) == 0 && !f.o.Quick
	if f.write && whole {
		if err := writeAll(out); err != nil {
			return err
		}
	}
	if f.compare {
		return compare(old, report.Ratios(out.Rows))
	}
	return nil
}

// moduleRoot is the directory of go.mod, from here upwards.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("run it inside the repository")
		}
	}
}

func readRatios() ([]report.Ratio, error) {
	f, err := os.Open(ratios)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r, err := report.ReadTSV(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", ratios, err)
	}
	return r, nil
}

func compare(old, now []report.Ratio) error {
	if len(old) == 0 {
		return fmt.Errorf("%s has nothing to compare with", ratios)
	}
	fmt.Printf("\n| ratio | committed | now | worse by |\n|---|---:|---:|---:|\n")
	bad := 0
	changes, few := report.Compare(old, now)
	for _, c := range changes {
		mark := ""
		if c.Worse > worse {
			bad++
			mark = " **!**"
		}
		fmt.Printf("| %s | %.3g | %.3g | %+.0f %%%s |\n", c.ID, c.Old, c.New, c.Worse*100, mark)
	}
	if few > 0 {
		fmt.Printf("\n%d more are of one round or two, which say nothing of that.\n", few)
	}
	if len(changes) == 0 {
		return errors.New("no ratio is of enough rounds to be compared")
	}
	if bad > 0 {
		return fmt.Errorf("%d ratios got worse by more than %.0f %%", bad, worse*100)
	}
	return nil
}

const (
	resultsBegin, resultsEnd = "<!-- results: begin -->", "<!-- results: end -->"
	profileBegin, profileEnd = "<!-- profile: begin -->", "<!-- profile: end -->"
)

// writeAll brings the document, the pictures and the ratios up to this run.
func writeAll(out *bench.Outcome) error {
	b, err := os.ReadFile(document)
	if err != nil {
		return err
	}
	var body strings.Builder
	fmt.Fprintf(&body, "Measured on %s.\n%s", out.Machine, report.Markdown(append(report.Goals(out.Rows), out.Rows...)))
	for _, n := range out.Notes {
		fmt.Fprintf(&body, "\n%s.\n", n)
	}
	if err := os.MkdirAll(pictures, 0o755); err != nil {
		return err
	}
	var names []string
	for name := range out.Charts {
		names = append(names, name)
	}
	slices.Sort(names)
	body.WriteString("\n### Pictures\n")
	for _, name := range names {
		c := out.Charts[name]
		if err := os.WriteFile(filepath.Join(pictures, name), []byte(c.SVG()), 0o644); err != nil {
			return err
		}
		fmt.Fprintf(&body, "\n![%s](%s)\n", c.Title, filepath.Join(filepath.Base(pictures), name))
	}
	text, err := report.Splice(string(b), resultsBegin, resultsEnd, body.String())
	if err != nil {
		return fmt.Errorf("%s: %w", document, err)
	}
	if text, err = report.Splice(text, profileBegin, profileEnd, out.Profile); err != nil {
		return fmt.Errorf("%s: %w", document, err)
	}
	if err := os.WriteFile(document, []byte(text), 0o644); err != nil {
		return err
	}
	f, err := os.Create(ratios)
	if err != nil {
		return err
	}
	return errors.Join(report.WriteTSV(f, report.Ratios(out.Rows)), f.Close())
}
