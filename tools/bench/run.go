package bench

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/capture/proving"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/tools/bench/report"
)

// Options of a run.
type Options struct {
	Binary string   // the ckagent to measure
	Source string   // cwp.c
	Memory string   // a directory on tmpfs: stores and files of most parts
	Disk   string   // a directory on a disk file system
	Rounds int      // of what costs little; what costs seconds gets a share of it
	Quick  bool     // the least that goes through every path once
	Only   []string // names of parts, or prefixes of them; empty: all
	Log    func(format string, args ...any)
}

// Outcome is what a run found.
type Outcome struct {
	Machine string // one line: processor, kernel, QEMU
	Rows    []report.Row
	Charts  map[string]report.Chart // by file name
	Profile string                  // Markdown: what the stages of a checkpoint and a restore cost
	Parts   []string                // that were measured
	Notes   []string
}

// bench is one run.
type bench struct {
	Options
	dir string // in Memory, removed at the end
	cwp string // the compiled limit
	out *Outcome

	stages []stageTable
	curve  map[string][]report.Point // pause by RAM used, by way
}

type part struct {
	name string
	run  func(*bench, context.Context) error
}

func parts() []part {
	list := []part{
		{"faults/missing", (*bench).missingFaults},
		{"faults/write", (*bench).writeFaults},
		{"resume", (*bench).flatResume},
	}
	for _, s := range restoreSpecs {
		list = append(list, part{"restore/" + s.name, func(b *bench, ctx context.Context) error { return b.restores(ctx, s) }})
	}
	for _, s := range checkpointSpecs {
		list = append(list, part{"checkpoint/" + s.name, func(b *bench, ctx context.Context) error { return b.checkpoints(ctx, s) }})
	}
	return append(list, part{"qcow2", (*bench).withDisk}, part{"disk", (*bench).onDisk}, part{"afterwards", (*bench).afterwards})
}

// PartNames lists what Only may name.
func PartNames() (names []string) {
	for _, p := range parts() {
		names = append(names, p.name)
	}
	return names
}

func (o *Options) wants(name string) bool {
	return len(o.Only) == 0 || slices.ContainsFunc(o.Only, func(s string) bool {
		return name == s || strings.HasPrefix(name, strings.TrimSuffix(s, "/")+"/")
	})
}

// proveEngine has engine bpf tried ahead, as a daemon does when it starts: what is measured
// is the engine that checkpoints take by themselves from then on.
func (b *bench) proveEngine(ctx context.Context) error {
	paths, err := proving.New([]string{b.Binary}).All(ctx, proving.ByAuto)
	for _, p := range paths {
		if p.Outcome != proving.Proved {
			b.out.Notes = append(b.out.Notes, fmt.Sprintf("engine bpf was not taken for %s RAM (%s): %s", p.RAM, p.Outcome, p.Detail))
			b.Log("%s", b.out.Notes[len(b.out.Notes)-1])
		}
	}
	return err
}

// Run measures.
func Run(ctx context.Context, o Options) (_ *Outcome, err error) {
	b := &bench{Options: o, out: &Outcome{Charts: map[string]report.Chart{}}, curve: map[string][]report.Point{}}
	if b.Log == nil {
		b.Log = func(string, ...any) {}
	}
	for _, s := range o.Only {
		if !slices.ContainsFunc(PartNames(), func(n string) bool { return (&Options{Only: []string{s}}).wants(n) }) {
			return nil, problem.New(problem.Usage, "bench", s, "no such part").WithHint("parts: %s", strings.Join(PartNames(), " "))
		}
	}
	if b.Binary, err = filepath.Abs(o.Binary); err != nil {
		return nil, err
	}
	if _, err := os.Stat(b.Binary); err != nil {
		return nil, problem.New(problem.Usage, "bench", b.Binary, "%w", err).WithHint("make build")
	}
	if b.dir, err = os.MkdirTemp(o.Memory, "ckagent-bench-"); err != nil {
		return nil, err
	}
	defer os.RemoveAll(b.dir)
	b.cwp = filepath.Join(b.dir, "cwp")
	if out, err := exec.CommandContext(ctx, "gcc", "-O2", "-o", b.cwp, o.Source).CombinedOutput(); err != nil {
		return nil, problem.New(problem.Failed, "compile", o.Source, "%w: %s", err, out)
	}
	if b.out.Machine, err = describeMachine(ctx); err != nil {
		return nil, err
	}
	if err := b.proveEngine(ctx); err != nil {
		return nil, err
	}
	for _, p := range parts() {
		if !o.wants(p.name) {
			continue
		}
		begin := time.Now()
		if err := p.run(b, ctx); err != nil {
			return nil, fmt.Errorf("part %s: %w", p.name, err)
		}
		b.out.Parts = append(b.out.Parts, p.name)
		b.Log("%s done in %.0f s", p.name, time.Since(begin).Seconds())
	}
	b.pauseChart()
	b.out.Profile = profileMarkdown(b.stages)
	return b.out, nil
}

// rounds is n of the run's rounds in hundred, at least least; one in a quick run.
func (b *bench) rounds(percent, least int) int {
	if b.Quick {
		return 1
	}
	return max(least, b.Rounds*percent/100)
}

func (b *bench) row(r report.Row) { b.out.Rows = append(b.out.Rows, r) }

// describeMachine says on what was measured; no date and no name, so that the
// document changes only when figures or the machine do.
func describeMachine(ctx context.Context) (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", err
	}
	version, err := exec.CommandContext(ctx, "qemu-system-x86_64", "--version").Output()
	if err != nil {
		return "", problem.New(problem.NotFound, "bench", "qemu-system-x86_64", "%w", err)
	}
	line, _, _ := strings.Cut(string(version), "\n")
	model := "unknown processor"
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for l := range strings.Lines(string(info)) {
			if k, v, ok := strings.Cut(l, ":"); ok && strings.TrimSpace(k) == "model name" {
				model = strings.TrimSpace(v)
				break
			}
		}
	}
	return fmt.Sprintf("%d cores of %s, Linux %s, %s, %s", runtime.NumCPU(), model, unix.ByteSliceToString(u.Release[:]), line, runtime.Version()), nil
}

// wait lets time pass: a window of the measurement.
func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
