package pager

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/procstat"
	"github.com/ckagent/ckagent/uffd/pagemap"
)

func mixed(pages uint64) []testBlock {
	return []testBlock{
		{Pages: pages, HasCow: true},
		{Pages: pages / 2, Memfd: true, HasCow: true},
		{Pages: 37, Eager: true},
		{Pages: 65, Memfd: true, Eager: true},
	}
}

// TestServesDrainsAndLetsGo is the whole life: every page right under concurrent
// readers and writers, zero pages not allocated, nothing attached at the end.
func TestServesDrainsAndLetsGo(t *testing.T) {
	for _, compress := range []string{"none", "zstd"} {
		t.Run(compress, func(t *testing.T) {
			blocks := mixed(8192)
			dir := writeTestImage(t, blocks, compress)
			tg := startTarget(t, targetSpec{Blocks: blocks, Threads: 3, Seed: 1})
			cfg := tg.config(t, dir, blocks)
			cfg.BytesPerSecond = 100 << 20
			p := tg.serve(t, cfg)
			tg.ask("go")
			mustWait(t, p)
			tg.checkLetGo(t)
			st := p.Stats()
			tg.ask("stop")
			r := tg.ask("all")
			if r.Bad != 0 || r.Touches == 0 {
				t.Fatalf("%d pages wrong, %d right: %s", r.Bad, r.Touches, r.First)
			}
			if st.Faults == 0 || st.DrainedBytes == 0 || st.LeftPages != 0 || st.BadPages != 0 || st.WorkerStarts != 1 || st.SupervisorStart != 1 {
				t.Fatalf("%+v", st)
			}
			t.Logf("target saw p50 %d p99 %d ns; %+v", r.P50NS, r.P99NS, st)
		})
	}
}

// TestZeroPagesAreNotAllocated: after a drain without a guest only the pages that
// have content take memory, and the others read as zeros.
func TestZeroPagesAreNotAllocated(t *testing.T) {
	blocks := []testBlock{{Pages: 8192}, {Pages: 8192, Memfd: true}}
	dir := writeTestImage(t, blocks, "none")
	tg := startTarget(t, targetSpec{Blocks: blocks, Threads: 1})
	cfg := tg.config(t, dir, blocks)
	cfg.CollapseBudget = -1
	p := tg.serve(t, cfg)
	mustWait(t, p)
	want, page := 0, make([]byte, PageBytes)
	for n := range uint64(8192) {
		if pageOf(0, n, page); page[0] != 0 {
			want++
		}
	}
	for i, hva := range tg.hello.HVA {
		if got := rssPages(t, tg.cmd.Process.Pid, hva, 8192*PageBytes); got > want || i == 0 && got < want*9/10 {
			t.Errorf("block %d: %d pages resident, %d have content", i, got, want)
		}
	}
	if r := tg.ask("all"); r.Bad != 0 || r.Touches != 16384 {
		t.Fatalf("%d wrong, %d right: %s", r.Bad, r.Touches, r.First)
	}
}

// rssPages is how many pages of a block are resident, mappings of the zero page
// aside. The block must not be split.
func rssPages(t *testing.T, pid int, hva, bytes uint64) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		var lo, hi uint64
		if n, _ := fmt.Sscanf(line, "%x-%x ", &lo, &hi); n == 2 && lo <= hva && hva < hi && hi < hva+bytes {
			t.Errorf("mapping %x-%x: split, the block ends at %x", lo, hi, hva+bytes)
		}
	}
	pm, err := pagemap.Open(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer pm.Close()
	n, err := pm.Count(hva, hva+bytes, pagemap.Query{CategoryInverted: pagemap.IsPFNZero,
		Mask: pagemap.IsPresent | pagemap.IsPFNZero, Return: pagemap.IsPresent})
	if err != nil {
		t.Fatal(err)
	}
	return int(n)
}

// TestSurvivesDeathsAndFreezes kills and freezes worker and supervisor at random
// instants while threads read and write; several whole lives, so that the ends of
// them are hit too.
func TestSurvivesDeathsAndFreezes(t *testing.T) {
	wantKills, wantStops := 100, 6
	if testing.Short() { // with the race detector each start takes several times as long
		wantKills, wantStops = 30, 2
	}
	blocks := mixed(4096)
	dir := writeTestImage(t, blocks, "none")
	r := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 3))
	kills, stops, both, lives := 0, 0, 0, 0
	for kills < wantKills || stops < wantStops {
		lives++
		tg := startTarget(t, targetSpec{Blocks: blocks, Threads: 3, Seed: uint64(lives)})
		cfg := tg.config(t, dir, blocks)
		cfg.BytesPerSecond = 60 << 20
		if lives%3 == 0 {
			// A slow source makes a life long, and the time between reading a fault
			// and serving it most of what a worker does.
			params, err := json.Marshal(slowParams{dir, 200 * time.Microsecond})
			if err != nil {
				t.Fatal(err)
			}
			cfg.Source = &SourceSpec{Kind: "slow", Params: params}
		}
		cfg.CollapseBudget = -1
		p := tg.serve(t, cfg)
		tg.ask("go")
		worked, until := uint64(0), kills+stops+40
		for !p.ctl.phaseNow().over() && kills+stops < until {
			s, sig := &p.ctl.worker, unix.SIGKILL
			if r.IntN(4) == 0 {
				s = &p.ctl.supervisor
			}
			if stops < wantStops && r.IntN(12) == 0 {
				sig = unix.SIGSTOP
			}
			if o := s.occupant(); present(o) && unix.Kill(o.PID, sig) == nil {
				if sig == unix.SIGSTOP {
					stops++
				} else {
					kills++
				}
			}
			if r.IntN(20) == 0 { // both at once: the starter steps in
				both++
				kill(p.ctl.worker.occupant())
				kill(p.ctl.supervisor.occupant())
			}
			ts := time.NewTimer(time.Duration(r.Int64N(int64(60 * time.Millisecond))))
			select {
			case <-p.over:
				ts.Stop()
			case <-ts.C:
			}
			// Mostly let the next worker get to work, or a slow machine would never
			// get past killing them at their start.
			if s == &p.ctl.worker && r.IntN(4) != 0 {
				patience := time.Now().Add(3 * time.Second)
				for s.works.Load() == worked && !p.ctl.phaseNow().over() && time.Now().Before(patience) {
					p.ctl.waitPhase(p.ctl.phaseNow(), 2*time.Millisecond)
				}
			}
			worked = p.ctl.worker.works.Load()
		}
		mustWait(t, p)
		for _, s := range []*seat{&p.ctl.worker, &p.ctl.supervisor} {
			if o := s.occupant(); present(o) {
				t.Fatalf("life %d: process %d is left behind", lives, o.PID)
			}
		}
		tg.checkLetGo(t)
		tg.ask("stop")
		if rep := tg.ask("all"); rep.Bad != 0 || rep.Touches == 0 {
			t.Fatalf("life %d: %d pages wrong, %d right: %s", lives, rep.Bad, rep.Touches, rep.First)
		}
	}
	t.Logf("%d kills, %d freezes, %d times both at once, in %d lives", kills, stops, both, lives)
}

// TestResumeByHand: both processes die and nobody is there to step in; Resume goes
// on from the run directory.
func TestResumeByHand(t *testing.T) {
	blocks := mixed(8192)
	dir := writeTestImage(t, blocks, "none")
	tg := startTarget(t, targetSpec{Blocks: blocks, Threads: 2})
	cfg := tg.config(t, dir, blocks)
	cfg.BytesPerSecond = 10 << 20
	ctx := context.Background()
	p, err := Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	tg.ask("go")
	waitFor(t, "faults", 5*time.Second, func() bool { return p.Stats().Faults > 0 })
	p.Close() // as if the starter had gone
	if _, err := Resume(ctx, t.TempDir()); !problem.Is(err, problem.NotFound) {
		t.Errorf("an empty directory: %v", err)
	}
	joined, err := Resume(ctx, cfg.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	st := joined.Stats()
	if st.WorkerStarts != 1 || st.Faults == 0 {
		t.Fatalf("joining a living pager: %+v", st)
	}
	joined.Close()
	killBoth(t, st)
	// One may have seen the other die first, and be starting another.
	waitFor(t, "a new pager", 5*time.Second, func() bool {
		p, err = Resume(ctx, cfg.RunDir)
		return err == nil
	})
	defer tg.endPager(p)
	if p.Stats().WorkerPID == st.WorkerPID {
		t.Fatal("still the dead one")
	}
	mustWait(t, p)
	tg.checkLetGo(t)
	tg.ask("stop")
	if r := tg.ask("all"); r.Bad != 0 || r.Touches == 0 {
		t.Fatalf("%+v", r)
	}
	if _, err := Resume(ctx, cfg.RunDir); !problem.Is(err, problem.NotFound) {
		t.Errorf("resume after the end: %v", err)
	}
}

// TestDetachCleansUp: a detached pager finishes alone and removes its files.
func TestDetachCleansUp(t *testing.T) {
	blocks := mixed(4096)
	dir := writeTestImage(t, blocks, "none")
	tg := startTarget(t, targetSpec{Blocks: blocks, Threads: 2})
	cfg := tg.config(t, dir, blocks)
	cfg.RunDir = filepath.Join(t.TempDir(), "run")
	if err := os.Mkdir(cfg.RunDir, 0o700); err != nil {
		t.Fatal(err)
	}
	cfg.BytesPerSecond = 50 << 20
	p, err := Start(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{stateFile, seatsFile, logFile} {
		if st, err := os.Stat(filepath.Join(cfg.RunDir, name)); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", name, st, err)
		}
	}
	if err := p.Detach(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "run directory removed", 10*time.Second, func() bool {
		_, err := os.Stat(cfg.RunDir)
		return os.IsNotExist(err)
	})
	tg.checkLetGo(t)
	if r := tg.ask("all"); r.Bad != 0 {
		t.Fatalf("%+v", r)
	}
}

// TestPrestartAbort: a warm pager leaves nothing behind.
func TestPrestartAbort(t *testing.T) {
	dir := t.TempDir()
	w, err := Prestart(context.Background(), os.Args[0], dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	pids := []occupant{w.ctl.worker.occupant(), w.ctl.supervisor.occupant()}
	w.Abort()
	for _, o := range pids {
		if present(o) {
			t.Errorf("%d is alive", o.PID)
		}
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestHoldEnds: a drain that waits for its starter begins when that has ended, and
// when it stands still while faults come in.
func TestHoldEnds(t *testing.T) {
	blocks := []testBlock{{Pages: 4096}}
	dir := writeTestImage(t, blocks, "none")
	t.Run("starter gone", func(t *testing.T) {
		starter := exec.Command("sleep", "60")
		if err := starter.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = starter.Wait() }()
		defer func() { _ = starter.Process.Kill() }()
		tg := startTarget(t, targetSpec{Blocks: blocks, Threads: 1})
		cfg := tg.config(t, dir, blocks)
		cfg.NoDrain, cfg.StarterPID = true, starter.Process.Pid
		s, err := procstat.Read(cfg.StarterPID)
		if err != nil {
			t.Fatal(err)
		}
		cfg.StarterStart = s.StartTicks
		p := tg.serve(t, cfg)
		tg.ask("go")
		waitFor(t, "faults", 5*time.Second, func() bool { return p.Stats().Faults > 20 })
		// A successor of the worker keeps the hold as well.
		before := p.Stats()
		if err := unix.Kill(before.WorkerPID, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "faults served by another worker", 5*time.Second, func() bool { return p.Stats().Faults > before.Faults+20 })
		if p.ctl.has(flagRelease) {
			t.Fatal("released while the starter lives")
		}
		tg.ask("stop")
		if err := starter.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		mustWait(t, p)
		tg.checkLetGo(t)
	})
	t.Run("starter gone before", func(t *testing.T) {
		tg := startTarget(t, targetSpec{Blocks: blocks, Threads: 1})
		cfg := tg.config(t, dir, blocks)
		cfg.NoDrain, cfg.StarterPID, cfg.StarterStart = true, os.Getpid(), 1 // the number has been given to another
		mustWait(t, tg.serve(t, cfg))
	})
	t.Run("starter still", func(t *testing.T) {
		tg := startTarget(t, targetSpec{Blocks: blocks, Threads: 1})
		cfg := tg.config(t, dir, blocks)
		cfg.NoDrain, cfg.DrainAfter = true, 100*time.Millisecond
		p := tg.serve(t, cfg)
		tg.ask("go")
		mustWait(t, p)
		tg.checkLetGo(t)
	})
}
