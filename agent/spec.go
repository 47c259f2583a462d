package agent

import (
	"time"

	"github.com/ckagent/ckagent/agent/api/apipb"
	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/controller"
	"github.com/ckagent/ckagent/agent/problem"
)

// Defaults of a protection.
const (
	DefaultStore    = "/var/lib/ckagent"
	DefaultInterval = 15 * time.Minute
	DefaultKeep     = 4 // checkpoints of a VM
)

// anyCompression is what a policy chooses from if the operator leaves it the choice.
var anyCompression = []string{"none", "s2", "zstd"}

// Planned is a protection as it was asked for, on a command line, over a control socket
// or by the state of a daemon. What makes no sense is problem.Usage.
func Planned(s *apipb.Spec) (Options, Protection, error) {
	fail := func(format string, args ...any) (Options, Protection, error) {
		return Options{}, Protection{}, problem.New(problem.Usage, "attach", "", format, args...)
	}
	within := func(ns int64, least, most time.Duration) bool {
		return time.Duration(ns) >= least && time.Duration(ns) <= most
	}
	onDeath, ok := controller.ParseOnDeath(s.GetOnDeath())
	switch {
	case s.GetOnDeath() != "" && !ok:
		return fail("on death %q: want notify, restore or none", s.GetOnDeath())
	case s.GetKeepLast() < 0:
		return fail("keep %d: want 0 or more", s.GetKeepLast())
	case s.GetIntervalNs() != 0 && !within(s.GetIntervalNs(), MinInterval, 365*24*time.Hour):
		return fail("interval %v: want %v to a year", time.Duration(s.GetIntervalNs()), MinInterval)
	case s.GetHookTimeoutNs() != 0 && !within(s.GetHookTimeoutNs(), time.Second, 24*time.Hour):
		return fail("hook timeout %v: want at least 1s", time.Duration(s.GetHookTimeoutNs()))
	case s.GetFreezeNs() != 0 && !within(s.GetFreezeNs(), 100*time.Millisecond, time.Minute):
		return fail("freeze timeout %v: want 100ms to 1m", time.Duration(s.GetFreezeNs()))
	case s.GetRehearseEveryNs() != 0 && !within(s.GetRehearseEveryNs(), time.Minute, 365*24*time.Hour):
		return fail("rehearsal every %v: want at least 1m", time.Duration(s.GetRehearseEveryNs()))
	case len(s.GetParams()) > 0 && s.GetPolicy() == "":
		return fail("parameters without a policy")
	}
	o := Options{Name: s.GetName(), QMP: s.GetQmp(), LeaveDisksOut: s.GetDisks() == string(capture.DisksNone),
		Overlays: s.GetDisks() == string(capture.DisksOverlay),
		Freeze:   time.Duration(s.GetFreezeNs()),
		Track:    s.GetTrack(),
		Hooks:    Hooks{Pre: s.GetPreHook(), Post: s.GetPostHook(), Timeout: time.Duration(s.GetHookTimeoutNs())}}
	if o.Hooks.Timeout == 0 {
		o.Hooks.Timeout = time.Minute
	}
	fullEvery := capture.DefaultFullEvery
	if s.FullEvery != nil {
		fullEvery = int(s.GetFullEvery())
	}
	if fullEvery < 1 {
		return fail("a full checkpoint every %d: want 1 or more", fullEvery)
	}
	keep := DefaultKeep
	if s.KeepLast != nil {
		keep = int(s.GetKeepLast())
	}
	p := Protection{KeepLast: keep, OnDeath: onDeath, Capture: capture.Options{
		Direct: s.GetDirect(), Parent: s.GetParent(), FullEvery: fullEvery, Dedup: s.GetDedup(), Tenant: s.GetTenant(),
		Mode: capture.Mode(s.GetMode()), Engine: capture.Engine(s.GetEngine()), Compress: s.GetCompress(),
		MaxStall: time.Duration(s.GetMaxStallNs()), MinFreeBytes: s.GetMinFreeBytes(),
		ArenaBytes: s.GetArenaBytes(), BufferBytes: s.GetBufferBytes(), Disks: capture.Disks(s.GetDisks()),
		DiskSpeedBytes: s.GetDiskSpeedBytes(), DiskMemoryBytes: s.GetDiskMemoryBytes(),
		OverlayDir: s.GetOverlayDir()}}
	if p.Capture.Mode == "" {
		p.Capture.Mode = capture.Auto
	}
	if p.Capture.Engine == "" {
		p.Capture.Engine = capture.EngineAuto
	}
	if p.Capture.Compress == "" {
		p.Capture.Compress, p.Compressions = "none", anyCompression
	}
	o.Spare = capture.NewSpare(p.Capture)
	return o, p, nil
}
