package guardian

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/cgroup"

	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/agent/vm/inject"
)

const (
	tickEvery = 20 * time.Millisecond
	// memoryLimit lets the collector run after all should a take-over need more
	// than planned.
	memoryLimit = 64 << 20
)

// child is the guardian process. Its loop owns everything in it.
type child struct {
	setup
	control *Control
	page    *os.File
	link    int // -1 once the agent closed it
	way     way
	home    cgroup.Group
	known   []inject.Leftover
	timer   int

	agentDead, serverDead bool
	lastRun               int64
}

// Main is the guardian process: the hidden verb of the binary. It returns when
// there is nothing left to guard.
func Main(ctx context.Context, _ []string) error {
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(memoryLimit)
	// What ends the agent's terminal or service must not end this.
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGTERM, unix.SIGPIPE, unix.SIGQUIT)
	g, err := newChild(ctx)
	if g != nil {
		defer g.close()
	}
	if answerErr := answer(err); err != nil || answerErr != nil {
		return errors.Join(err, answerErr)
	}
	return g.run(ctx)
}

func answer(err error) error {
	var r ready
	if err != nil {
		r.Error = err.Error()
	}
	b, merr := json.Marshal(r)
	if merr != nil {
		return merr
	}
	_, werr := unix.Write(linkFD, b)
	return werr
}

// newChild takes over what was inherited and gets out of the agent's way.
func newChild(ctx context.Context) (*child, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Read(linkFD, buf)
	if err != nil {
		return nil, fmt.Errorf("guardian: read setup: %w", err)
	}
	g := &child{link: linkFD, timer: -1}
	if err := json.Unmarshal(buf[:n], &g.setup); err != nil {
		return nil, fmt.Errorf("guardian: setup: %w", err)
	}
	for fd := linkFD; fd <= lockFD; fd++ {
		unix.CloseOnExec(fd)
	}
	g.page = os.NewFile(controlFD, "control")
	g.way.endpoint = g.Endpoint
	if g.HaveQMP {
		g.way.socket = os.NewFile(qmpFD, "qmp")
	}
	g.serverDead = g.Server.PID == 0
	if g.control, err = OpenControl(g.page); err != nil {
		return g, err
	}
	g.home = cgroup.Join(groupName(g.QEMU))
	// All best effort: less of it makes a slower guardian, not a wrong one.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-900"), 0)
	_ = unix.Setpriority(unix.PRIO_PGRP, 0, -15)
	_ = unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT)
	if g.known, err = knownFDs(g.QEMU.PID); err != nil {
		return g, err
	}
	if g.timer, err = startTimer(); err != nil {
		return g, err
	}
	self, err := identify(os.Getpid())
	if err != nil {
		return g, err
	}
	removeStale(g.StateDir)
	_ = os.Remove(statePath(g.StateDir, g.QEMU) + reportSuffix)
	err = writeState(g.StateDir, state{Schema: stateSchema, QEMU: g.QEMU, Agent: g.Agent, Guardian: self,
		Server: g.Server, QMP: g.Endpoint, Known: g.known, Since: time.Now().Format(stateTimestamp)}, g.page)
	if err != nil {
		return g, fmt.Errorf("guardian: state file: %w", err)
	}
	if g.Endpoint.Libvirt {
		if err := g.connect(ctx); err != nil {
			return g, err
		}
	}
	g.control.beatGuardian()
	return g, nil
}

const connectPatience = 3 * time.Second

// connect opens a connection to libvirt of the guardian's own: the agent's ends
// with the agent, and when that is noticed it is too late to find that there is no
// way in.
func (g *child) connect(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(ctx, connectPatience)
	defer cancel()
	if g.way.client, err = qmp.Dial(ctx, g.Endpoint); err != nil {
		return fmt.Errorf("guardian: %w", err)
	}
	return nil
}

func startTimer() (int, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK)
	if err != nil {
		return -1, fmt.Errorf("guardian: timer: %w", err)
	}
	every := unix.NsecToTimespec(int64(tickEvery))
	if err := unix.TimerfdSettime(fd, 0, &unix.ItimerSpec{Interval: every, Value: every}, nil); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("guardian: timer: %w", err)
	}
	return fd, nil
}

func (g *child) close() {
	if g.way.client != nil {
		_ = g.way.client.Close() // this process ends with it
	}
	removeState(g.StateDir, g.QEMU)
	g.home.Leave()
}

// run is the loop. It allocates nothing until something happens.
func (g *child) run(ctx context.Context) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	fds := [5]unix.PollFd{
		{Fd: int32(g.link), Events: unix.POLLIN}, {Fd: agentFD, Events: unix.POLLIN},
		{Fd: qemuFD, Events: unix.POLLIN}, {Fd: serverFD, Events: unix.POLLIN},
		{Fd: int32(g.timer), Events: unix.POLLIN},
	}
	if g.serverDead {
		fds[3].Fd = -1
	}
	var o observation
	l := limits{agent: AgentSilence, server: time.Duration(g.ServerStall)}
	for ctx.Err() == nil {
		if _, err := unix.Poll(fds[:], -1); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("guardian: poll: %w", err)
		}
		if fds[0].Revents != 0 {
			fds[0].Fd = -1 // closed by the agent, or by its death
		}
		if fds[1].Revents != 0 {
			g.agentDead, fds[1].Fd = true, -1
		}
		if fds[3].Revents != 0 {
			g.serverDead, fds[3].Fd = true, -1
			// The agent comes to it only when it has given up the rest, which may wait
			// for QEMU to answer.
			_, _ = letContinue(g.control, qemuFD)
			g.mendInjection(ctx)
		}
		if fds[4].Revents != 0 {
			var ticks [8]byte
			_, _ = unix.Read(g.timer, ticks[:]) // EAGAIN is all that can happen
		}
		g.control.beatGuardian()
		g.observe(&o, fds[2].Revents != 0)
		what, why := watch(o, l)
		g.lastRun = o.now
		switch what {
		case exitNow:
			if !o.qemuDead {
				g.mendInjection(ctx) // the server may have died between poll and now
			}
			return nil
		case takeOver, tidy:
			return g.takeOver(ctx, why, what == takeOver)
		case killServer:
			// First: the agent sees the end of the server's socket at once and asks.
			g.control.GuardianActed.Store(uint32(ServerKilled))
			end(serverFD, g.Server.PID, g.home, tickEvery)
			g.serverDead = true // as far as watching goes; its pidfd is still polled
		}
	}
	return ctx.Err()
}

func (g *child) observe(o *observation, qemuDead bool) {
	c := g.control
	// Beats before the clock: one that comes in between must not look negative.
	*o = observation{
		agentBeat: c.AgentBeatNS.Load(), serverBeat: c.ServerBeatNS.Load(),
		agentDead: g.agentDead, serverDead: g.serverDead, qemuDead: qemuDead,
		engaged: c.Engaged.Load() != 0, stopped: c.Stopped.Load() != 0, sigStopped: c.SigStopped.Load() != 0,
		quit: c.QuitRequested.Load() != 0, left: c.left(), ownLastRun: g.lastRun, now: Now(),
	}
}

// takeOver puts the VM right. held says that the agent held it; if not, only
// what an interrupted injection left is looked for.
func (g *child) takeOver(ctx context.Context, why string, held bool) error {
	began := time.Now()
	r := Report{Schema: reportSchema, QEMUPID: g.QEMU.PID, Reason: why, At: began.Format(stateTimestamp),
		Phase: g.control.Phase.Load(), ClosedFDs: []int{}}
	acted := ActedNothing
	if held {
		g.control.GuardianActed.Store(uint32(Acting))
	}
	grace := time.Duration(g.ServerGrace)
	if !g.agentDead && g.control.QuitRequested.Load() == 0 {
		// It may still be writing to the monitor: a moment for it to go, but no
		// more than that.
		if !end(agentFD, g.Agent.PID, g.home, agentPatience) {
			grace = 0 // it hangs in the kernel, so the fault server cannot see its end
		}
		r.AgentEnded = true
	}
	gone := make(chan bool)
	go func() { // joined below
		killed := g.letGo(grace)
		// Without this the monitor would not answer either.
		_, _ = letContinue(g.control, qemuFD)
		gone <- killed
	}()
	if held {
		err := g.resume(ctx, &r)
		r.note(err)
		switch {
		case err != nil:
			acted = ActedFailed
		case r.Resumed:
			acted = ActedResumed
			r.ResumedNS = time.Since(began).Nanoseconds()
		}
	}
	r.ServerEnded = <-gone
	g.awaitHome()
	closeLeftovers(ctx, g.QEMU.PID, g.known, &r)
	kinds, err := armed(g.QEMU.PID)
	r.note(err)
	if r.Armed = kinds.writeProtect; r.Armed && held {
		r.note(errors.New("memory stays write-protected, and not by us: no process of ours is left"))
		acted = ActedFailed
	}
	r.TookNS = time.Since(began).Nanoseconds()
	if held {
		g.control.GuardianActed.Store(uint32(acted))
	}
	if r.AgentEnded {
		// The agent was killed and cannot say why. All is put right by now, so it
		// does no harm if whoever reads this has stopped reading.
		fmt.Fprintf(os.Stderr, "ckagent: guardian of pid %d: %s, so it was ended and the VM put right; there is no checkpoint\n", g.QEMU.PID, why)
	}
	if held || len(r.ClosedFDs) > 0 || r.ServerEnded {
		return writeJSON(statePath(g.StateDir, g.QEMU)+reportSuffix, r)
	}
	return nil
}

// resume tries until the VM runs or has ended. A QEMU that hangs, in a flush to
// disks that do not answer for instance, carries out our stop when it comes back,
// be it after minutes; whoever gave up by then leaves it stopped for ever.
func (g *child) resume(ctx context.Context, r *Report) error {
	for {
		err := resume(ctx, g.control, qemuFD, g.way, r)
		if err == nil || !g.control.left() || ctx.Err() != nil || waitExit(qemuFD, resumeAgain) {
			return err
		}
		g.control.beatGuardian()
	}
}

// mendInjection closes what a fault server left in QEMU that died, or was ended
// for its silence, in the middle of an injection. The agent lives and reports the
// failure of the capture; this only tidies up.
func (g *child) mendInjection(ctx context.Context) {
	if g.control.Injecting.Load() == 0 || g.Server.PID == 0 || !waitExit(serverFD, serverPatience) {
		return
	}
	r := Report{Schema: reportSchema, QEMUPID: g.QEMU.PID, Reason: "the fault server ended in an injection",
		At: time.Now().Format(stateTimestamp), ClosedFDs: []int{}}
	g.awaitHome()
	closeLeftovers(ctx, g.QEMU.PID, g.known, &r)
	g.control.Injecting.Store(0)
	if len(r.ClosedFDs) > 0 || len(r.Problems) > 0 {
		_ = writeJSON(statePath(g.StateDir, g.QEMU)+reportSuffix, r) // a report is not worth a failure
	}
}

// awaitHome waits until the thread that a dead fault server had borrowed has carried out
// what it was told, and so until no descriptor can come into being any more. A thread
// that never sleeps, or that somebody has stopped, is not waited for.
func (g *child) awaitHome() {
	tid := int(g.control.Injecting.Load())
	if tid == 0 {
		return
	}
	for limit := time.Now().Add(homePatience); !inject.Home(g.QEMU.PID, tid) && time.Now().Before(limit); {
		g.control.beatGuardian()
		if waitExit(qemuFD, time.Millisecond) {
			return
		}
	}
}

// letGo sees that the fault server ends: by itself within grace, since the agent is dead,
// or killed. Its end is what drops all protection, and what ends the programs that may stop
// QEMU by a signal: who gave up before would leave it stopped for ever.
func (g *child) letGo(grace time.Duration) (killed bool) {
	if g.Server.PID == 0 || waitExit(serverFD, grace) {
		return false
	}
	for gone := end(serverFD, g.Server.PID, g.home, serverPatience); !gone && !waitExit(qemuFD, 0); {
		_, _ = letContinue(g.control, qemuFD)
		gone = waitExit(serverFD, serverPatience)
	}
	return true
}
