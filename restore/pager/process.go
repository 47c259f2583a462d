package pager

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/cgroup"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/procstat"
)

// Stats is what a pager has done so far. Times are durations since Start was asked
// for, counters are over all workers there were.
type Stats struct {
	Phase           string `json:"phase"`
	ArmedNS         int64  `json:"armed_ns"`   // to armed, eager blocks written
	DrainedNS       int64  `json:"drained_ns"` // to the last page; 0: not yet
	DoneNS          int64  `json:"done_ns"`    // to nothing of us attached
	Faults          uint64 `json:"faults"`
	ZeroFaults      uint64 `json:"zero_faults"`
	LateFaults      uint64 `json:"late_faults"` // the page was there by the time we came
	FaultP50NS      int64  `json:"fault_p50_ns"`
	FaultP99NS      int64  `json:"fault_p99_ns"`
	FaultMaxNS      int64  `json:"fault_max_ns"`
	AheadPages      uint64 `json:"ahead_pages"`
	NearPages       uint64 `json:"near_pages"`
	HotPages        uint64 `json:"hot_pages"`
	DrainedBytes    uint64 `json:"drained_bytes"` // by the background
	LeftPages       int64  `json:"left_pages"`
	BadPages        int64  `json:"bad_pages"`
	ReadErrors      uint64 `json:"read_errors"`
	WorkerStarts    uint64 `json:"worker_starts"`
	SupervisorStart uint64 `json:"supervisor_starts"`
	CollapsedBytes  uint64 `json:"collapsed_bytes"`
	CollapseNS      int64  `json:"collapse_ns"`
	RSSBytes        uint64 `json:"rss_bytes"` // largest of the worker
	WorkerPID       int    `json:"worker_pid"`
	SupervisorPID   int    `json:"supervisor_pid"`
}

func statsOf(c *control) Stats {
	since := func(at int64) int64 {
		if at == 0 {
			return 0
		}
		return at - c.startNS.Load()
	}
	q := c.quantiles(0.5, 0.99, 1)
	return Stats{
		Phase: c.phaseNow().String(), ArmedNS: since(c.armedNS.Load()), DrainedNS: since(c.drainedNS.Load()),
		DoneNS: since(c.doneNS.Load()), Faults: c.faults.Load(), ZeroFaults: c.zeroFaults.Load(),
		LateFaults: c.late.Load(), FaultP50NS: q[0], FaultP99NS: q[1], FaultMaxNS: q[2],
		AheadPages: c.aheadPages.Load(), NearPages: c.nearPages.Load(), HotPages: c.hotPages.Load(),
		DrainedBytes: c.drainBytes.Load(), LeftPages: c.leftPages.Load(), BadPages: c.badPages.Load(),
		ReadErrors: c.readErrors.Load(), WorkerStarts: c.worker.spawns.Load(), SupervisorStart: c.supervisor.spawns.Load(),
		CollapsedBytes: c.collapsed.Load(), CollapseNS: c.collapseNS.Load(), RSSBytes: c.rssBytes.Load(),
		WorkerPID: c.worker.occupant().PID, SupervisorPID: c.supervisor.occupant().PID,
	}
}

// Warm is a pager that was started but has nothing to serve yet.
type Warm struct {
	self, runDir string
	ctl          *control
	children     []*os.Process
	leashes      []*os.File
}

// Prestart starts the two processes ahead of time, so that their start (and the
// opening of the source) overlaps with that of the process to be served. source may
// be nil. They end by themselves if the caller dies or calls Abort.
func Prestart(ctx context.Context, self, runDir string, source *SourceSpec) (_ *Warm, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if st, err := os.Stat(runDir); err != nil || !st.IsDir() {
		return nil, problem.New(problem.Failed, "start pager", runDir, "run directory: %w", errors.Join(err, unix.ENOTDIR))
	}
	w := &Warm{self: self, runDir: runDir}
	defer func() {
		if err != nil {
			w.Abort()
			err = problem.New(problem.Failed, "start pager", runDir, "%w", err)
		}
	}()
	if w.ctl, err = newControl(); err != nil {
		return nil, err
	}
	warm := ""
	if source != nil {
		b, err := json.Marshal(source)
		if err != nil {
			return nil, err
		}
		warm = string(b)
	}
	for _, r := range []role{workerRole, supervisorRole} {
		rd, wr, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		w.leashes = append(w.leashes, wr)
		if r.verb == VerbSupervisor {
			warm = ""
		}
		p, err := spawn(r, occupant{}, self, runDir, w.ctl, rd, warm)
		rd.Close()
		if err != nil {
			return nil, err
		}
		w.children = append(w.children, p)
	}
	return w, nil
}

// Abort ends a pager that was not started.
func (w *Warm) Abort() {
	for _, l := range w.leashes {
		l.Close()
	}
	w.leashes = nil
	for _, p := range w.children {
		_ = p.Kill()
		_, _ = p.Wait()
	}
	w.children = nil
	cgroup.Sweep()
	if w.ctl != nil {
		w.ctl.close()
		w.ctl = nil
	}
	removeFiles(w.runDir)
}

// Process is a running pager as its starter sees it. One goroutine of its own
// follows the phase; Detach or the end of Wait joins it.
type Process struct {
	runDir   string
	self     string
	ctl      *control
	children []*os.Process
	drained  chan struct{}
	over     chan struct{} // the follower has ended
	damaged  chan struct{}
	quit     chan struct{}
	once     sync.Once
}

// Start starts a pager: Prestart and (*Warm).Start in one.
func Start(ctx context.Context, cfg Config) (*Process, error) {
	w, err := Prestart(ctx, cfg.Self, cfg.RunDir, nil)
	if err != nil {
		return nil, err
	}
	return w.Start(ctx, cfg)
}

// Start gives a warm pager its work and returns when the eager blocks are written
// and the lazy ones armed. On failure nothing of the pager remains; the memory of
// the process may be half written.
func (w *Warm) Start(ctx context.Context, cfg Config) (_ *Process, err error) {
	defer func() {
		if err != nil {
			w.Abort()
		}
	}()
	cfg.Self, cfg.RunDir = w.self, w.runDir
	if cfg.NoDrain && cfg.StarterPID == 0 {
		me, err := myself()
		if err != nil {
			return nil, problem.New(problem.Failed, "start pager", cfg.RunDir, "%w", err)
		}
		cfg.StarterPID, cfg.StarterStart = me.PID, me.Start
	}
	if err := cfg.resolve(); err != nil {
		return nil, problem.New(problem.Usage, "start pager", cfg.RunDir, "%w", err)
	}
	if err := writeFile(cfg.RunDir, stateFile, &state{Schema: stateSchema, Phase: PhaseConfigured.String(), Config: cfg}); err != nil {
		return nil, problem.New(problem.Failed, "start pager", cfg.RunDir, "%w", err)
	}
	if err := noteSeats(cfg.RunDir, w.ctl); err != nil {
		return nil, problem.New(problem.Failed, "start pager", cfg.RunDir, "%w", err)
	}
	now := nowNS()
	w.ctl.startNS.Store(now)
	w.ctl.worker.beatNS.Store(now + graceNS)
	w.ctl.supervisor.beatNS.Store(now + graceNS)
	w.ctl.advance(PhaseConfigured)
	for _, l := range w.leashes {
		if _, err := l.Write([]byte{1}); err != nil {
			return nil, problem.New(problem.Failed, "start pager", cfg.RunDir, "%w", err).
				WithHint("see %s", filepath.Join(cfg.RunDir, logFile))
		}
		l.Close()
	}
	w.leashes = nil
	for w.ctl.phaseNow() == PhaseConfigured {
		if err := ctx.Err(); err != nil {
			w.ctl.advance(PhaseFailed)
			w.end()
			return nil, problem.New(problem.CodeOf(err), "start pager", cfg.RunDir, "%w", err)
		}
		w.ctl.waitPhase(PhaseConfigured, beatEvery)
		// One of the two starts the other again. If both have ended, and whom they
		// started as well, nobody is left to.
		if w.children = reap(w.children); len(w.children) == 0 && !present(w.ctl.worker.occupant()) && !present(w.ctl.supervisor.occupant()) &&
			w.ctl.phaseNow() == PhaseConfigured {
			w.ctl.advance(PhaseFailed)
			return nil, problem.New(problem.Failed, "start pager", cfg.RunDir, "both of its processes ended before they could serve").
				WithHint("somebody killed them; restore again")
		}
	}
	switch w.ctl.phaseNow() {
	case PhaseFailed:
		if st, err := loadState(cfg.RunDir); err == nil && st.Error != nil {
			return nil, st.Error.Err()
		}
		return nil, problem.New(problem.Failed, "start pager", cfg.RunDir, "it failed and could not say why")
	case PhaseGone:
		return nil, problem.New(problem.NotFound, "start pager", fmt.Sprintf("pid %d", cfg.QEMUPID), "the process has ended")
	}
	return newProcess(w.runDir, w.self, w.ctl, w.children), nil
}

// end kills whoever sits in the two seats.
func (w *Warm) end() {
	for _, s := range []*seat{&w.ctl.worker, &w.ctl.supervisor} {
		kill(s.occupant())
	}
}

// endNow kills an occupant that has nothing left to do and tidies up after it.
func endNow(r role, c *control) {
	o := r.seat(c).occupant()
	kill(o)
	awaitExit(o, lastWords)
	cgroup.Remove(groupName(r.name, o.PID))
}

func kill(o occupant) {
	fd, err := unix.PidfdOpen(o.PID, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if o.exists() {
		_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	}
}

func newProcess(runDir, self string, ctl *control, children []*os.Process) *Process {
	p := &Process{runDir: runDir, self: self, ctl: ctl, children: children, drained: make(chan struct{}),
		over: make(chan struct{}), damaged: make(chan struct{}), quit: make(chan struct{})}
	go p.follow()
	return p
}

// follow turns phases into channels, reaps, and steps in if both processes died or
// froze at once.
func (p *Process) follow() {
	defer close(p.over)
	var lifelessNS int64 // since when both are
	damaged, drained := p.damaged, p.drained
	for {
		ph := p.ctl.phaseNow()
		if ph == PhaseDamaged && damaged != nil || p.ctl.badPages.Load() > 0 && ph >= PhaseReleasing && damaged != nil {
			close(damaged)
			damaged = nil
		}
		if (ph == PhaseReleasing || ph == PhaseDone) && drained != nil {
			close(drained)
			drained = nil
		}
		p.children = reap(p.children)
		if ph.over() {
			for _, r := range []role{workerRole, supervisorRole} {
				s := r.seat(p.ctl)
				awaitExit(s.occupant(), lastWords)
				if present(s.occupant()) {
					endNow(r, p.ctl) // stopped in its last moments
				}
			}
			p.children = reap(p.children)
			return
		}
		switch now := nowNS(); {
		case !p.ctl.worker.lifeless(now) || !p.ctl.supervisor.lifeless(now):
			lifelessNS = 0
		case lifelessNS == 0 && (present(p.ctl.worker.occupant()) || present(p.ctl.supervisor.occupant())):
			// Looked at again: all of us may have stood still, and they go on now.
			lifelessNS = now
		case now-lifelessNS >= int64(beatEvery):
			p.stepIn()
			lifelessNS = 0
		}
		select {
		case <-p.quit:
			return
		default:
		}
		p.ctl.waitPhase(ph, beatEvery)
	}
}

// stepIn starts another supervisor, which finds no worker and starts one.
func (p *Process) stepIn() {
	old := p.ctl.supervisor.occupant()
	for _, o := range []occupant{old, p.ctl.worker.occupant()} {
		if present(o) {
			kill(o)
			cgroup.Roots().Free(o.PID)
		}
	}
	c, err := spawn(supervisorRole, old, p.self, p.runDir, p.ctl, nil, "")
	if err != nil {
		return // superseded, or tried again at the next look
	}
	p.children = append(p.children, c)
	_ = noteSeats(p.runDir, p.ctl)
}

// present reports whether an occupant is alive (a zombie is not).
func present(o occupant) bool {
	s, err := procstat.Read(o.PID)
	return err == nil && s.StartTicks == o.Start && !s.Ended()
}

// Stats reads the counters.
func (p *Process) Stats() Stats { return statsOf(p.ctl) }

// Drained is closed when every page is in.
func (p *Process) Drained() <-chan struct{} { return p.drained }

// Release starts the drain of a pager configured with NoDrain. It starts by itself
// when the starter ends without having called Release.
func (p *Process) Release() { p.ctl.setFlag(flagRelease) }

// Retry has pages that could not be had tried again.
func (p *Process) Retry() { p.ctl.setFlag(flagRetry) }

// Wait returns when nothing of the pager is attached any more and its processes
// have ended (nil), when pages turned out not to be had (a problem of code
// Integrity or Store; the pager goes on, for everything else), when the process
// served ended, or with ctx.
func (p *Process) Wait(ctx context.Context) error {
	select {
	case <-p.over:
	case <-p.damaged:
	case <-ctx.Done():
		return problem.New(problem.CodeOf(ctx.Err()), opPageIn, p.runDir, "%w", ctx.Err())
	}
	return p.verdict()
}

func (p *Process) verdict() error {
	if bad := p.ctl.badPages.Load(); bad > 0 {
		e := &problem.Error{Code: problem.Integrity, Op: opPageIn, Object: p.runDir,
			Hint: "the guest waits where it touches one of them; verify the checkpoint, mend the store and resume the pager"}
		if st, err := loadState(p.runDir); err == nil && st.Damage != nil {
			e.Code = st.Damage.First.Code
			if e.Code != problem.Integrity && e.Code != problem.Store {
				e.Code = problem.Integrity
			}
			if st.Config.BadPage == BadPagePoison {
				e.Hint = "the guest gets a memory error where it touches one of them"
			}
			e.Err = fmt.Errorf("%d pages cannot be had: %w", bad, st.Damage.First.Err())
		} else {
			e.Err = fmt.Errorf("%d pages cannot be had", bad)
		}
		return e
	}
	switch p.ctl.phaseNow() {
	case PhaseGone:
		return problem.New(problem.Failed, opPageIn, p.runDir, "the process ended before everything was in")
	case PhaseFailed:
		return problem.New(problem.Failed, opPageIn, p.runDir, "failed")
	}
	return nil
}

// Detach lets the pager go on alone: it finishes the drain, lets go and removes its
// files from the run directory. The Process must not be used any more.
func (p *Process) Detach() error {
	p.ctl.setFlag(flagDetached)
	over := p.ctl.phaseNow().over()
	p.Close()
	if over {
		cleanUp(p.runDir)
	}
	return nil
}

// Close frees what the starter holds, without any effect on the pager: its files
// stay in the run directory. The Process must not be used any more.
func (p *Process) Close() {
	p.once.Do(func() {
		close(p.quit)
		p.ctl.wake()
		<-p.over
		for _, c := range reap(p.children) {
			_ = c.Release()
		}
		p.ctl.close()
	})
}

func unmarshalStrict(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	return d.Decode(v)
}
