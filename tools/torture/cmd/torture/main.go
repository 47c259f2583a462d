// Command torture runs the kill matrix: see package torture.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/tools/torture"
)

var parts = []string{"steps", "random", "sizes", "restores", "stores", "tests"}

func main() {
	var (
		binary  = flag.String("binary", "bin/ckagent", "the binary to harm")
		only    = flag.String("only", strings.Join(parts, ","), "parts of the campaign, comma separated")
		limit   = flag.Duration("for", 45*time.Minute, "no new round after this time")
		seed    = flag.Uint64("seed", uint64(time.Now().UnixNano()), "of the random instants")
		random  = flag.Int("random", 300, "random instants")
		pause   = flag.Int("in-pause", 120, "of them between STOP and RESUME")
		sizes   = flag.String("sizes", "1 GiB,4 GiB,8 GiB", "guests of part sizes")
		results = flag.String("results", "", "append each outcome to this file of JSON lines (default: a new one in -dir)")
		report  = flag.String("report", "docs/torture.md", "write the summary of the results here; empty: only print it")
		dir     = flag.String("dir", "", "scratch directory (default: a temporary one)")
	)
	flag.Parse()
	o := options{*binary, strings.Split(*only, ","), *limit, *seed, *random, *pause, strings.Split(*sizes, ","), *results, *report, *dir}
	if err := run(o); err != nil {
		fmt.Fprintln(os.Stderr, "torture:", err)
		os.Exit(1)
	}
}

type options struct {
	binary               string
	only                 []string
	limit                time.Duration
	seed                 uint64
	random, pause        int
	sizes                []string
	results, report, dir string
}

var errExceptions = errors.New("there were exceptions")

func run(o options) error {
	for _, p := range o.only {
		if !slices.Contains(parts, p) && p != "none" {
			return fmt.Errorf("part %q: want some of %s, or none to write the report only", p, strings.Join(parts, ", "))
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, o.limit)
	defer cancel()
	c := &torture.Campaign{Binary: o.binary, Dir: o.dir, Log: os.Stdout}
	if err := c.Open(); err != nil {
		return err
	}
	defer c.Close()
	if o.results == "" {
		o.results = c.Dir + "/results.jsonl"
	}
	rec, err := torture.NewRecorder(o.results)
	if err != nil {
		return err
	}
	defer rec.Close()
	c.Record = func(out torture.Outcome) {
		if err := rec.Record(out); err != nil {
			fmt.Fprintln(os.Stderr, "torture: record:", err)
		}
	}
	fmt.Printf("seed %d, parts %s\n", o.seed, strings.Join(o.only, " "))
	if err := campaign(ctx, c, o); err != nil {
		return err
	}
	if ctx.Err() != nil {
		fmt.Println("the time is over, or somebody interrupted: what was not run is missing")
	}
	text, err := torture.Report(o.results)
	if err != nil {
		return err
	}
	fmt.Println()
	fmt.Println(text)
	if o.report != "" {
		if err := os.WriteFile(o.report, []byte(text), 0o644); err != nil {
			return err
		}
	}
	if c.Failed() > 0 {
		return fmt.Errorf("%d of %d rounds: %w", c.Failed(), c.Done(), errExceptions)
	}
	return nil
}

func campaign(ctx context.Context, c *torture.Campaign, o options) error {
	rng := rand.New(rand.NewPCG(o.seed, 0))
	small := torture.Sizes["256 MiB"]
	for _, part := range o.only {
		var err error
		switch part {
		case "steps", "random":
			var s *torture.Survey
			if s, err = c.Survey(ctx, small); err != nil {
				break
			}
			if part == "steps" {
				err = c.Checkpoints(ctx, small, torture.StepRounds(rng, s))
			} else {
				err = c.Checkpoints(ctx, small, torture.RandomRounds(rng, o.random, o.pause))
			}
		case "sizes":
			for _, name := range o.sizes {
				size, ok := torture.Sizes[name]
				if !ok {
					return fmt.Errorf("size %q is not known", name)
				}
				if err = c.Checkpoints(ctx, size, torture.SizeRounds()); err != nil {
					break
				}
			}
		case "restores":
			err = c.Restores(ctx, torture.RestoreRounds(rng, 60))
		case "stores":
			err = c.Stores(ctx, rng, 12)
		case "tests":
			err = c.Tests(ctx)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", part, err)
		}
	}
	return nil
}
