package pager

import (
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/procstat"
)

// TestFrozenWorkerIsReplaced: how long a guest waits when the worker is frozen and
// nothing else happens.
func TestFrozenWorkerIsReplaced(t *testing.T) {
	blocks := []testBlock{{Pages: 1 << 16}}
	dir := writeTestImage(t, blocks, "none")
	tg := startTarget(t, targetSpec{Blocks: blocks, Threads: 2})
	cfg := tg.config(t, dir, blocks)
	cfg.NoDrain = true
	p := tg.serve(t, cfg)
	tg.ask("go")
	for _, sig := range []unix.Signal{unix.SIGSTOP, unix.SIGKILL} {
		before := p.Stats()
		t0 := time.Now()
		if err := unix.Kill(before.WorkerPID, sig); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "faults served by another worker", 5*time.Second, func() bool {
			s := p.Stats()
			return s.WorkerPID != before.WorkerPID && s.Faults > before.Faults+5
		})
		d := time.Since(t0)
		t.Logf("%v: served again after %v", sig, d)
		if d > 3*time.Second {
			t.Errorf("%v: %v is too long", sig, d)
		}
	}
	p.Release()
	mustWait(t, p)
	tg.checkLetGo(t)
	if r := tg.ask("stop"); r.Bad != 0 || r.Touches == 0 {
		t.Fatalf("%+v", r)
	}
}

// TestBothFrozen: worker and supervisor are stopped at once; who follows them steps
// in, the starter or, if it has gone, who resumes.
func TestBothFrozen(t *testing.T) {
	blocks := mixed(8192)
	dir := writeTestImage(t, blocks, "none")
	tg := startTarget(t, targetSpec{Blocks: blocks, Threads: 2})
	cfg := tg.config(t, dir, blocks)
	cfg.BytesPerSecond = 10 << 20
	p, err := Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { tg.endPager(p) }()
	tg.ask("go")
	for _, who := range []string{"starter", "resumer"} {
		faults := p.Stats().Faults
		waitFor(t, "faults", 5*time.Second, func() bool { return p.Stats().Faults > faults })
		before, worker, supervisor := p.Stats(), p.ctl.worker.works.Load(), p.ctl.supervisor.works.Load()
		stop := func() {
			for _, pid := range []int{before.SupervisorPID, before.WorkerPID} {
				if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
					t.Fatal(err)
				}
			}
		}
		t0 := time.Now()
		if who == "resumer" {
			p.Close()
			stop()
			if p, err = Resume(t.Context(), cfg.RunDir); err != nil {
				t.Fatal(err)
			}
		} else {
			stop()
		}
		waitFor(t, "both replaced by the "+who, 8*time.Second, func() bool {
			s := p.Stats()
			return s.WorkerPID != before.WorkerPID && s.SupervisorPID != before.SupervisorPID &&
				p.ctl.worker.works.Load() > worker && p.ctl.supervisor.works.Load() > supervisor
		})
		t.Logf("%s: served again after %v", who, time.Since(t0))
	}
	mustWait(t, p)
	tg.checkLetGo(t)
	tg.ask("stop")
	if r := tg.ask("all"); r.Bad != 0 || r.Touches == 0 {
		t.Fatalf("%+v", r)
	}
}

// TestBothContinued: two that were stopped and go on together leave each other alone.
func TestBothContinued(t *testing.T) {
	blocks := []testBlock{{Pages: 8192}}
	dir := writeTestImage(t, blocks, "none")
	tg := startTarget(t, targetSpec{Blocks: blocks, Threads: 1})
	cfg := tg.config(t, dir, blocks)
	cfg.NoDrain = true
	p, err := Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctl, err := openControl(dupControl(t, p.ctl))
	if err != nil {
		t.Fatal(err)
	}
	defer ctl.close()
	waitFor(t, "both at work", 5*time.Second, func() bool { return ctl.worker.works.Load() > 0 && ctl.supervisor.works.Load() > 0 })
	p.Close() // nobody follows
	both := func(sig unix.Signal) {
		for _, s := range []*seat{&ctl.worker, &ctl.supervisor} {
			if err := unix.Kill(s.occupant().PID, sig); err != nil {
				t.Fatal(err)
			}
		}
	}
	both(unix.SIGSTOP)
	silent := starvedFor + 200*time.Millisecond
	waitFor(t, "silence", 5*time.Second, func() bool {
		return nowNS()-max(ctl.worker.beatNS.Load(), ctl.supervisor.beatNS.Load()) > int64(silent)
	})
	both(unix.SIGCONT)
	ctl.setFlag(flagRelease)
	waitFor(t, "the end", 20*time.Second, func() bool { return ctl.phaseNow() == PhaseDone })
	if s := statsOf(ctl); s.WorkerStarts != 1 || s.SupervisorStart != 1 {
		t.Errorf("%d workers, %d supervisors: one ended the other", s.WorkerStarts, s.SupervisorStart)
	}
	for _, s := range []*seat{&ctl.worker, &ctl.supervisor} {
		awaitExit(s.occupant(), lastWords)
	}
	tg.checkLetGo(t)
}

func dupControl(t *testing.T, c *control) *os.File {
	t.Helper()
	fd, err := unix.FcntlInt(c.file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), controlMapping)
}

func killBoth(t *testing.T, st Stats) {
	t.Helper()
	// The supervisor first and stopped, or it would fill the worker's seat again.
	for _, pid := range []int{st.SupervisorPID, st.WorkerPID} {
		if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
	}
	for _, pid := range []int{st.SupervisorPID, st.WorkerPID} {
		s, err := procstat.Read(pid)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "death", 5*time.Second, func() bool { return !present(occupant{pid, s.StartTicks}) })
	}
}
