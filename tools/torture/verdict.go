package torture

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// check looks at everything after the harm.
func (r *run) check(ctx context.Context, agent *Proc, began time.Time, ended chan struct{}) {
	b, out := r.b, r.out
	bound := Bound(b.size.MemoryMiB)
	halted := out.Acted && (r.round.Victim == Agent || r.round.Victim == Service || r.round.Victim == Both)
	if r.round.Victim == Both && out.Acted {
		// Nobody is left who would do it by itself.
		var text []byte
		var err error
		await(bound, func() bool {
			cmd := exec.CommandContext(ctx, b.g.Binary, "release", strconv.Itoa(b.PID()), "--json")
			cmd.Env = append(os.Environ(), "CKAGENT_RUN_DIR="+b.state)
			text, err = cmd.CombinedOutput()
			// Busy: the killed agent is not quite gone yet.
			return err == nil || cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != 5
		})
		if err != nil {
			out.fail("release: %v: %s", err, text)
		}
	}
	if halted && r.round.Action != Starve {
		// The agent does nothing more: from here the guest must come free by itself.
		why := b.settled(ctx, r.round.Paused)
		await(time.Until(r.at.Add(bound+3*time.Second)), func() bool { why = b.settled(ctx, r.round.Paused); return why == nil })
		out.Settled = time.Since(r.at)
		switch {
		case why != nil:
			out.fail("%v after the harm: %v", out.Settled.Round(time.Millisecond), why)
		case out.Settled > bound+checkSlack(b.size):
			out.failLate("nothing of ours was in QEMU only %v after the harm, bound %v", out.Settled.Round(time.Millisecond), bound)
		}
	}
	if r.round.Action == Starve && out.Acted {
		// As long as a take-over may last; then whoever still lives may go on.
		agent.ended(bound + time.Second)
	}
	r.undo()
	if !agent.ended(agentPatience) {
		out.fail("the agent has not ended %v after the harm", time.Since(r.at).Round(time.Second))
		_ = agent.signal(unix.SIGKILL)
	}
	<-ended
	var left []int
	if !await(afterwards, func() bool { left = orphans(); return len(left) == 0 }) {
		out.failLate("still there %v after the agent's end: pids %v", afterwards, left)
		await(3*afterwards, func() bool { left = orphans(); return len(left) == 0 })
	}
	for _, pid := range left {
		out.fail("left behind: pid %d %s", pid, verbOf(pid))
		_ = unix.Kill(pid, unix.SIGKILL) // our own descendant, and not reaped yet
	}
	why := b.settled(ctx, r.round.Paused)
	await(time.Second, func() bool { why = b.settled(ctx, r.round.Paused); return why == nil })
	if why != nil {
		out.fail("after the agent's end: %v", why)
	}
	if out.Settled == 0 && out.Acted {
		out.Settled = time.Since(r.at)
	}
	if !r.round.Paused {
		end := time.Now()
		out.Silence, out.Longest = silence(b.vm.Beats(), began, r.at, end)
		if !out.Acted {
			out.Silence = 0
		}
		limit := bound
		if r.round.Victim == QEMU && out.Acted {
			limit += qemuStopped
		}
		if out.Silence > limit {
			out.failLate("the guest was silent for %v after the harm, bound %v", out.Silence.Round(time.Millisecond), limit)
		}
	}
	if err := b.leftovers(); err != nil {
		out.fail("%v", err)
	}
	out.Steps = b.tap.seen()
	r.checkExit()
	if err := b.checkStore(ctx, out.Exit == 0, out.Acted); err != nil {
		out.fail("store: %v", err)
	}
}

// checkSlack is what looking takes: reading smaps of a large guest, on a busy host.
func checkSlack(s Size) time.Duration {
	return 100*time.Millisecond + time.Duration(s.MemoryMiB)*time.Millisecond*20/1024
}

// checkExit: an unharmed agent succeeds; a harmed one may fail, but says so in the
// form that was asked for and with a code that means "nothing lost, try again".
func (r *run) checkExit() {
	out := r.out
	switch {
	case !out.Acted && (out.Exit == 5 || out.Exit == -1 && strings.Contains(r.log.String(), "gave no sign of life")):
		// A helper got no processor in time, and the checkpoint was given up: not
		// what this round wanted to see, but right on a host that is overloaded.
		out.Busy = true
	case !out.Acted && out.Exit != 0:
		out.fail("an unharmed checkpoint ended with %d", out.Exit)
	case out.Exit == -1 && (r.round.Victim == Agent || r.round.Victim == Service || r.round.Victim == Both):
	case out.Exit == 0, out.Exit == 1, out.Exit == 5:
	default:
		out.fail("the agent ended with %d", out.Exit)
	}
	if out.Exit > 0 {
		r.checkMessage()
	}
}

// checkMessage: a failure is one JSON object with an error. What was said last may
// still be on its way to us when the agent has ended.
func (r *run) checkMessage() {
	if await(time.Second, r.explained) {
		return
	}
	r.out.fail("the agent ended with %d and did not say why", r.out.Exit)
}

func (r *run) explained() bool {
	for line := range strings.Lines(r.log.String()) {
		var m struct {
			Error *struct{ Code, Message string }
		}
		if strings.HasPrefix(line, "{") && json.Unmarshal([]byte(line), &m) == nil && m.Error != nil && m.Error.Message != "" {
			return true
		}
	}
	return false
}

// qemuDied: with QEMU gone, the agent says "not found" soon and nothing stays.
func (r *run) qemuDied(ended chan struct{}) {
	b, out := r.b, r.out
	<-b.vm.Done()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		out.fail("the agent has not ended 10 s after QEMU")
		_ = r.cmd.Process.Kill()
		<-ended
	}
	out.Settled = time.Since(r.at)
	var left []int
	if !await(afterwards, func() bool { left = orphans(); return len(left) == 0 }) {
		for _, pid := range left {
			out.fail("left behind: pid %d %s", pid, verbOf(pid))
			_ = unix.Kill(pid, unix.SIGKILL) // our own descendant, and not reaped yet
		}
	}
	if out.Exit != 6 && out.Exit != 0 {
		out.fail("QEMU was killed and the agent ended with %d, want 6 (not found)", out.Exit)
	}
	if out.Exit != 0 {
		r.checkMessage()
	}
	if err := b.checkStore(context.Background(), out.Exit == 0, true); err != nil {
		out.fail("store: %v", err)
	}
	names, _ := os.ReadDir(b.state)
	for _, n := range names {
		if strings.HasPrefix(n.Name(), strconv.Itoa(b.PID())+"-") && !strings.HasSuffix(n.Name(), ".report.json") {
			out.fail("left in the state directory: %s", n.Name())
		}
	}
}
