package pager

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/uffd"
)

// flip inverts a byte of every page of a segment in [from, to).
func flip(t *testing.T, dir string, from, to int64) (undo func()) {
	t.Helper()
	segs, err := filepath.Glob(filepath.Join(dir, "seg-*"))
	if err != nil || len(segs) == 0 {
		t.Fatalf("no segments: %v", err)
	}
	change := func() {
		f, err := os.OpenFile(segs[0], os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		var b [1]byte
		for p := from; p < to; p++ {
			if _, err := f.ReadAt(b[:], p*PageBytes+100); err != nil {
				t.Fatal(err)
			}
			b[0] ^= 0x10
			if _, err := f.WriteAt(b[:], p*PageBytes+100); err != nil {
				t.Fatal(err)
			}
		}
	}
	change()
	return change
}

// TestDamagedPagesAreNeverFed: threads that touch a damaged page wait, everything
// else is brought in, the failure is reported as one of integrity, and mending the
// image lets the threads go on.
func TestDamagedPagesAreNeverFed(t *testing.T) {
	blocks := []testBlock{{Pages: 4096, HasCow: true}}
	dir := writeTestImage(t, blocks, "none")
	undo := flip(t, dir, 500, 520)
	tg := startTarget(t, targetSpec{Blocks: blocks, Threads: 3})
	cfg := tg.config(t, dir, blocks)
	cfg.Retries = 2
	p := tg.serve(t, cfg)
	tg.ask("go")
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	err := p.Wait(ctx)
	if !problem.Is(err, problem.Integrity) || problem.ExitCode(err) != 4 {
		t.Fatalf("Wait: %v", err)
	}
	t.Log(err)
	st := p.Stats()
	if st.Phase != "damaged" || st.BadPages != 20 || st.LeftPages != 20 {
		t.Fatalf("%+v", st)
	}
	waitFor(t, "threads waiting", 10*time.Second, func() bool { return tg.ask("report").Busy > 0 })
	if r := tg.ask("report"); r.Bad != 0 {
		t.Fatalf("fed a wrong page: %+v", r)
	}
	// A worker's death changes nothing about it.
	before := st.WorkerPID
	kill(p.ctl.worker.occupant())
	waitFor(t, "another worker", 5*time.Second, func() bool {
		s := p.Stats()
		return s.WorkerPID != before && s.BadPages == 20
	})
	if r := tg.ask("report"); r.Bad != 0 || r.Busy == 0 {
		t.Fatalf("%+v", r)
	}
	undo()
	p.Retry()
	waitFor(t, "the end", 10*time.Second, func() bool { return p.ctl.phaseNow() == PhaseDone })
	mustWait(t, p)
	tg.checkLetGo(t)
	tg.ask("stop")
	if r := tg.ask("all"); r.Bad != 0 {
		t.Fatalf("%+v", r)
	}
}

// TestTruncatedWhileServing: the image shrinks under the pager.
func TestTruncatedWhileServing(t *testing.T) {
	blocks := []testBlock{{Pages: 8192}}
	dir := writeTestImage(t, blocks, "none")
	tg := startTarget(t, targetSpec{Blocks: blocks, Threads: 2})
	cfg := tg.config(t, dir, blocks)
	cfg.NoDrain, cfg.Retries = true, 1
	p := tg.serve(t, cfg)
	segs, _ := filepath.Glob(filepath.Join(dir, "seg-*"))
	for _, s := range segs {
		if err := os.Truncate(s, 2<<20); err != nil {
			t.Fatal(err)
		}
	}
	tg.ask("go")
	p.Release()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := p.Wait(ctx); !problem.Is(err, problem.Integrity) {
		t.Fatalf("Wait: %v", err)
	}
	if r := tg.ask("report"); r.Bad != 0 {
		t.Fatalf("%+v", r)
	}
}

// TestPoison: with that choice bad pages become memory errors and the rest is let go.
func TestPoison(t *testing.T) {
	have, err := uffd.Probe()
	if err != nil {
		t.Fatal(err)
	}
	if !have.Has(uffd.FeaturePoison) {
		t.Skip("this kernel has no UFFDIO_POISON (6.6)")
	}
	blocks := []testBlock{{Pages: 1024}}
	dir := writeTestImage(t, blocks, "none")
	flip(t, dir, 100, 103)
	tg := startTarget(t, targetSpec{Blocks: blocks, Threads: 1, Quiet: true})
	cfg := tg.config(t, dir, blocks)
	cfg.BadPage, cfg.Retries = BadPagePoison, 1
	p := tg.serve(t, cfg)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	waitFor(t, "the end", 10*time.Second, func() bool { return p.ctl.phaseNow() == PhaseDone })
	if err := p.Wait(ctx); !problem.Is(err, problem.Integrity) {
		t.Fatalf("Wait: %v", err)
	}
	tg.checkLetGo(t)
	// The target dies of it rather than see zeros.
	if _, err := tg.in.Write([]byte("all\n")); err != nil {
		t.Fatal(err)
	}
	if line, err := tg.out.ReadBytes('\n'); err == nil {
		t.Fatalf("read over poisoned pages: %s", line)
	}
}

// TestRefusals: what Start says no to, leaving nothing behind.
func TestRefusals(t *testing.T) {
	blocks := []testBlock{{Pages: 256}}
	dir := writeTestImage(t, blocks, "none")
	for _, c := range []struct {
		name   string
		spec   []testBlock
		change func(*Config)
		code   problem.Code
	}{
		{"memory that has pages", []testBlock{{Pages: 256, Dirty: true}}, nil, problem.Refused},
		{"a file that has pages", []testBlock{{Pages: 256, Dirty: true, Memfd: true}}, nil, problem.Refused},
		{"more pages than the checkpoint", []testBlock{{Pages: 512}}, nil, problem.Integrity},
		{"no such image", blocks, func(c *Config) { c.ImageDir = "/nonexistent" }, problem.NotFound},
		{"a reused pid", blocks, func(c *Config) { c.QEMUStart++ }, problem.NotFound},
		{"not a userfaultfd", blocks, func(c *Config) { c.RemoteFD = 0 }, problem.Failed},
		{"overlapping blocks", blocks, func(c *Config) { c.Blocks = append(c.Blocks, c.Blocks[0]) }, problem.Usage},
	} {
		t.Run(c.name, func(t *testing.T) {
			tg := startTarget(t, targetSpec{Blocks: c.spec, Threads: 1})
			cfg := tg.config(t, dir, c.spec)
			if c.change != nil {
				c.change(&cfg)
			}
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			p, err := Start(ctx, cfg)
			if err == nil {
				tg.endPager(p)
				t.Fatal("accepted")
			}
			if !problem.Is(err, c.code) {
				t.Fatalf("%v, want %s: %v", problem.CodeOf(err), c.code, err)
			}
			var pe *problem.Error
			if !errors.As(err, &pe) {
				t.Fatalf("%T", err)
			}
			t.Log(err)
			b, err := os.ReadFile("/proc/" + itoa(tg.cmd.Process.Pid) + "/smaps")
			if err != nil {
				t.Fatal(err)
			}
			if containsFlag(string(b), "um") {
				t.Error("still registered")
			}
		})
	}
}

func itoa(n int) string { return strconv.Itoa(n) }

func containsFlag(smaps, flag string) bool {
	for _, line := range strings.Split(smaps, "\n") {
		if strings.HasPrefix(line, "VmFlags:") && strings.Contains(line+" ", " "+flag+" ") {
			return true
		}
	}
	return false
}
