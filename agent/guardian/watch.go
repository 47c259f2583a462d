package guardian

import "time"

// observation is what the loop sees at one tick; watch is pure logic over it.
type observation struct {
	now                               int64 // ns, CLOCK_MONOTONIC
	agentDead, serverDead, qemuDead   bool
	engaged, stopped, sigStopped      bool
	quit                              bool
	left                              bool // stopped by us and not known to run again
	agentBeat, serverBeat, ownLastRun int64
}

// order is what to do about it.
type order uint8

const (
	goOn       order = iota
	exitNow          // nothing is left to guard
	takeOver         // the agent is dead or silent while it held the VM
	tidy             // the agent died holding nothing: only see that nothing is left
	killServer       // the fault server is silent
)

// limits are the silences that are tolerated.
type limits struct {
	agent, server time.Duration
}

// watch decides. ownGap protects against judging others by our own absence: if
// this process itself did not run for a while (the host is overloaded, somebody
// stopped us), the others may have been kept from it by the same; they get until
// the next tick.
const ownGap = int64(100 * time.Millisecond)

func watch(o observation, l limits) (order, string) {
	held := o.engaged || o.stopped || o.sigStopped
	switch {
	case o.qemuDead:
		return exitNow, "QEMU ended"
	case o.quit && o.left:
		return takeOver, "the agent could not resume the VM"
	case o.quit:
		return exitNow, "asked to"
	case o.agentDead && held:
		return takeOver, "the agent died"
	case o.agentDead:
		return tidy, "the agent died"
	case !o.engaged:
		return goOn, ""
	case o.ownLastRun != 0 && o.now-o.ownLastRun > ownGap:
		return goOn, ""
	case o.now-o.agentBeat > int64(l.agent):
		return takeOver, "the agent gave no sign of life"
	case !o.serverDead && o.serverBeat != 0 && o.now-o.serverBeat > int64(l.server):
		return killServer, "the fault server gave no sign of life"
	}
	return goOn, ""
}
