package guardian

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/agent/vm"
	"github.com/ckagent/ckagent/agent/vm/disk"
	"github.com/ckagent/ckagent/agent/vm/inject"
)

// How long the steps of a take-over may take. None waits for another's success.
const (
	agentPatience   = 100 * time.Millisecond // for a killed agent to be gone
	serverPatience  = 2 * time.Second        // for a killed fault server: its exit unprotects memory
	monitorPatience = 10 * time.Second       // for QMP to be in step; it may be flushing disks
	injectPatience  = 3 * time.Second        // for closing descriptors inside
	homePatience    = 200 * time.Millisecond // for a borrowed thread to be back where it was
	resumeAgain     = time.Second            // between two tries to resume
	diskPatience    = 30 * time.Second       // for copies of disks to be cancelled
)

// Report says what a take-over or a release did.
type Report struct {
	Schema       string `json:"schema"`
	QEMUPID      int    `json:"qemu_pid"`
	Reason       string `json:"reason"`
	At           string `json:"at"`
	Phase        uint32 `json:"phase"`                   // the agent's, as it left it
	AgentEnded   bool   `json:"agent_ended"`             // by us
	GuardEnded   bool   `json:"guardian_ended"`          // by us (release only)
	ServerEnded  bool   `json:"fault_server_ended"`      // by us, as it did not go by itself
	Continued    bool   `json:"continued"`               // SIGCONT sent
	StatusBefore string `json:"status_before,omitempty"` // QEMU's run state as found
	Resumed      bool   `json:"resumed"`                 // `cont` sent
	ClosedFDs    []int  `json:"closed_fds"`              // descriptors closed inside QEMU
	Armed        bool   `json:"armed"`                   // memory is still write-protected
	TookNS       int64  `json:"took_ns"`
	ResumedNS    int64  `json:"resumed_ns,omitempty"` // from the decision to QEMU's answer to `cont`
	// Disks is what was taken out of the block graph.
	Disks    *disk.Swept `json:"disks,omitempty"`
	Problems []string    `json:"problems,omitempty"`
}

const reportSchema = "ckagent.release/1"

func (r *Report) note(err error) {
	if err != nil {
		r.Problems = append(r.Problems, err.Error())
	}
}

// knownFDs are the descriptors that FindLeftovers lists before anything of ours
// is in the process.
func knownFDs(pid int) ([]inject.Leftover, error) { return inject.FindLeftovers(pid) }

// newFDs are those that were not known.
func newFDs(pid int, known []inject.Leftover) ([]int, error) {
	now, err := inject.FindLeftovers(pid)
	if err != nil {
		return nil, err
	}
	var fds []int
	for _, l := range now {
		if !slices.Contains(known, l) {
			fds = append(fds, l.FD)
		}
	}
	return fds, nil
}

// closeLeftovers closes inside QEMU what an interrupted injection left.
func closeLeftovers(ctx context.Context, pid int, known []inject.Leftover, r *Report) {
	fds, err := newFDs(pid, known)
	if err != nil || len(fds) == 0 {
		r.note(err)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, injectPatience)
	defer cancel()
	if err := inject.CloseFDs(ctx, pid, fds); err != nil {
		r.note(err)
		return
	}
	r.ClosedFDs = append(r.ClosedFDs, fds...)
}

// armedKinds are the userfaultfd registrations that smaps shows of a process:
// um missing, uw write-protect, ui minor.
type armedKinds struct{ missing, writeProtect, minor bool }

func armed(pid int) (armedKinds, error) {
	var k armedKinds
	f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/smaps")
	if err != nil {
		return k, err
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	sc.Buffer(make([]byte, 0, 8192), 64<<10)
	for sc.Scan() {
		flags, ok := bytes.CutPrefix(sc.Bytes(), []byte("VmFlags:"))
		if !ok {
			continue
		}
		for flag := range bytes.FieldsSeq(flags) {
			switch string(flag) {
			case "um":
				k.missing = true
			case "uw":
				k.writeProtect = true
			case "ui":
				k.minor = true
			}
		}
	}
	return k, sc.Err()
}

// way is how a guardian gets to the monitor.
type way struct {
	socket   *os.File     // duplicate of the agent's connection; nil if there is none
	client   *qmp.Client  // a connection of its own, where libvirt lets several in; nil otherwise
	endpoint qmp.Endpoint // the way back in if those are lost
}

// letContinue sends SIGCONT if QEMU may have been stopped by a signal of ours. What
// sends the other one are programs in the kernel, which live as long as the fault
// server: who acts before its end has to do so again after it.
func letContinue(c *Control, qemuPidfd int) (sent bool, err error) {
	if c.SigStopped.Load() == 0 {
		return false, nil
	}
	if err := unix.PidfdSendSignal(qemuPidfd, unix.SIGCONT, nil, 0); err != nil {
		return false, fmt.Errorf("SIGCONT: %w", err)
	}
	return true, nil
}

// resume lets QEMU go on as far as the control page says that we stopped it.
func resume(ctx context.Context, c *Control, qemuPidfd int, w way, r *Report) error {
	sent, err := letContinue(c, qemuPidfd)
	if err != nil {
		return err
	}
	r.Continued = r.Continued || sent
	ctx, cancel := context.WithTimeout(ctx, monitorPatience)
	defer cancel()
	m, done, err := openMonitor(ctx, w)
	if err != nil {
		if c.Stopped.Load() == 0 {
			return nil // nothing to resume: an unusable monitor is not our matter
		}
		return err
	}
	defer done()
	// Half a command of the agent's is off the wire now, also if there is nothing
	// to resume: the next user of this monitor finds it clean.
	if c.left() {
		if r.StatusBefore, r.Resumed, err = resumeVM(ctx, m); err != nil {
			return err
		}
		if w.endpoint.Libvirt && !r.Resumed {
			if err := settle(ctx, m, r); err != nil {
				return err
			}
		}
		c.Stopped.Store(0)
	}
	r.note(dropFdsets(ctx, m))
	r.sweepDisks(ctx, m)
	return nil
}

// sweepDisks takes out of the block graph what a checkpoint copies disks with. The
// bitmaps stay: they cost next to nothing, and the next checkpoint judges them.
func (r *Report) sweepDisks(ctx context.Context, m executor) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), diskPatience)
	defer cancel()
	swept, err := disk.Sweep(ctx, m, false)
	r.note(err)
	r.Disks = &swept
}

// How long a command of the agent's is taken to be still on its way through
// libvirt, which carries out what a lost client had sent, and in no order with
// what others send.
const (
	settleFor   = 500 * time.Millisecond
	settleEvery = 10 * time.Millisecond
)

// settle watches a machine that was found running, for a stop that comes late.
func settle(ctx context.Context, m executor, r *Report) error {
	tick := time.NewTicker(settleEvery)
	defer tick.Stop()
	for end := time.Now().Add(settleFor); time.Now().Before(end); {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		before, resumed, err := resumeVM(ctx, m)
		if err != nil {
			return err
		}
		if resumed {
			r.StatusBefore, r.Resumed = before, true
			return nil
		}
	}
	return nil
}

// FdsetOpaque marks the descriptor sets that a checkpoint makes in QEMU.
const FdsetOpaque = "ckagent"

// FDName is the name of the descriptor by which a checkpoint of a machine that
// stands still lends QEMU the memory for the device state.
const FDName = "ckagent-device-state"

// dropFdsets gives back the descriptors that a checkpoint could not: while another
// monitor is connected QEMU keeps sets.
func dropFdsets(ctx context.Context, m executor) error {
	var sets []struct {
		ID  int `json:"fdset-id"`
		FDs []struct {
			Opaque string `json:"opaque"`
		} `json:"fds"`
	}
	if err := m.Execute(ctx, "query-fdsets", nil, &sets); err != nil {
		return err
	}
	// QEMU refuses if there is none of this name, as nearly always.
	_ = m.Execute(ctx, "closefd", map[string]string{"fdname": FDName}, nil)
	var errs []error
	for _, s := range sets {
		if len(s.FDs) > 0 && s.FDs[0].Opaque == FdsetOpaque {
			errs = append(errs, m.Execute(ctx, "remove-fd", map[string]int{"fdset-id": s.ID}, nil))
		}
	}
	return errors.Join(errs...)
}

// Resume lets QEMU go on, for an agent that lives but lost its way to the monitor
// inside a pause. It does what the guardian would do after the agent's death, and
// nothing if the control page says that nothing was stopped. The agent's own connection must be closed.
func Resume(ctx context.Context, c *Control, qemu *vm.Process, endpoint qmp.Endpoint) error {
	var r Report
	err := resume(ctx, c, int(qemu.PidFD().Fd()), way{endpoint: endpoint}, &r)
	if err != nil {
		return problem.New(problem.Failed, "resume", qemu.String(), "the VM was left paused: %w", err).
			WithHint("ckagent release %d, or cont in QEMU's monitor", qemu.PID)
	}
	return nil
}

func openMonitor(ctx context.Context, w way) (executor, func(), error) {
	if w.client != nil && w.client.Err() == nil {
		return w.client, func() {}, nil
	}
	var first error
	if w.socket != nil {
		m, err := takeMonitor(ctx, w.socket)
		if err == nil {
			return m, m.close, nil
		}
		first = err
	}
	if w.endpoint.Network == "" {
		return nil, nil, errors.Join(first, errors.New("no way to reach QMP"))
	}
	if w.socket != nil {
		// QEMU serves one connection per monitor: ours must be gone first.
		w.socket.Close()
	}
	client, err := qmp.Dial(ctx, w.endpoint)
	if err != nil && w.endpoint.Libvirt {
		// A daemon that died or was restarted must not keep the machine stopped.
		var orphan error
		if client, orphan = qmp.DialOrphan(ctx, w.endpoint); orphan == nil {
			err = nil
		}
	}
	if err != nil {
		return nil, nil, errors.Join(first, err)
	}
	return client, func() { client.Close() }, nil
}
