package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent/api/apipb"
)

func newStatusCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "status VM", Short: "Show how a VM is protected, by which policy, and why so", Args: exactArgs(1, "a VM or the pid of its QEMU"),
		RunE: func(c *cobra.Command, args []string) error { return runStatus(c, a, args[0]) },
	}
}

type policyView struct {
	Name       string            `json:"name"`
	Path       string            `json:"path"`
	Generation uint64            `json:"generation"`
	SHA256     string            `json:"sha256"`
	Params     map[string]string `json:"params"`
	Wanted     string            `json:"wanted"`
	Trouble    string            `json:"trouble"`
	Decisions  uint64            `json:"decisions"`
	PID        int32             `json:"pid"`
}

type decisionView struct {
	Mode       string `json:"mode"`
	Engine     string `json:"engine"`
	AtNS       int64  `json:"at_ns"`
	At         string `json:"at"`
	Reason     string `json:"reason"`
	IntervalNS int64  `json:"interval_ns"`
	Generation uint64 `json:"generation"`
	Policy     string `json:"policy"`
	Source     string `json:"source"`
}

type statusView struct {
	Schema         string         `json:"schema"`
	VM             string         `json:"vm"`
	QEMUPID        int32          `json:"qemu_pid"`
	State          string         `json:"state"`
	Protected      bool           `json:"protected"`
	Degraded       []string       `json:"degraded"`
	Policy         policyView     `json:"policy"`
	Decision       decisionView   `json:"decision"`
	LastSuccess    string         `json:"last_success"` // empty: none yet
	LastCheckpoint string         `json:"last_checkpoint"`
	NextAt         string         `json:"next_at"`
	RPONS          int64          `json:"rpo_ns"`
	Checkpoints    uint64         `json:"checkpoints"`
	Failures       uint64         `json:"failures"`
	LastError      string         `json:"last_error"`
	Store          string         `json:"store"`
	OnDeath        string         `json:"on_death"`
	Ended          *endingView    `json:"ended,omitempty"`
	Rehearsal      *rehearsalView `json:"rehearsal,omitempty"`
}

// endingView is how a VM that is gone came to its end.
type endingView struct {
	How    string `json:"how"`
	Detail string `json:"detail"`
	At     string `json:"at"`
}

// rehearsalView is the last test restore of a VM.
type rehearsalView struct {
	At        string `json:"at"`
	OK        bool   `json:"ok"`
	ID        string `json:"id"`
	RunningNS int64  `json:"command_to_running_ns"`
	Error     string `json:"error"`
}

func runStatus(c *cobra.Command, a *app, ref string) (err error) {
	vm, err := a.findProtected(c.Context(), ref)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, vm.conn.Close()) }()
	v := viewStatus(vm.status)
	if a.json {
		a.print("status", v)
		return nil
	}
	p := func(what, format string, args ...any) {
		fmt.Fprintf(a.out, "%-9s %s\n", what, fmt.Sprintf(format, args...))
	}
	p("vm", "%s, pid %d, %s%s", v.VM, v.QEMUPID, v.State, map[bool]string{false: ", not protected"}[v.Protected])
	p("policy", "%s, generation %d, %s %s", v.Policy.Name, v.Policy.Generation, dashIf(v.Policy.Path, "built in"), paramText(v.Policy.Params))
	p("decision", "%s (by %s, generation %d)", v.Decision.Reason, v.Decision.Policy, v.Decision.Generation)
	p("last", "%s %s", dash(v.LastSuccess), v.LastCheckpoint)
	p("next", "%s", dash(v.NextAt))
	p("at risk", "%s", durationText(time.Duration(v.RPONS)))
	if r := v.Rehearsal; r != nil {
		p("rehearsed", "%s, %s: %s", r.At, r.ID, dashIf(oneLine(r.Error), "it ran"))
	}
	for _, d := range v.Degraded {
		p("degraded", "%s", oneLine(d))
	}
	return nil
}

func dashIf(s, none string) string {
	if s == "" {
		return none
	}
	return s
}

func viewStatus(s *apipb.VMStatus) statusView {
	v := statusView{Schema: schema("status"), VM: s.GetVm(), QEMUPID: s.GetQemuPid(), State: s.GetState(), Protected: s.GetProtected(),
		Degraded: append([]string{}, s.GetDegraded()...), Policy: viewPolicy(s.GetPolicy()), Decision: viewDecision(s.GetDecision()),
		LastSuccess: instant(s.GetLastSuccessNs()), LastCheckpoint: s.GetLastCheckpoint(), NextAt: instant(s.GetNextAtNs()), RPONS: s.GetRpoNs(),
		Checkpoints: s.GetCheckpoints(), Failures: s.GetFailures(), LastError: s.GetLastError(),
		Store: s.GetStore(), OnDeath: s.GetOnDeath()}
	if e := s.GetEnded(); e != nil {
		v.Ended = &endingView{e.GetHow(), e.GetDetail(), instant(e.GetAtNs())}
	}
	if r := s.GetRehearsal(); r != nil {
		v.Rehearsal = &rehearsalView{instant(r.GetAtNs()), r.GetOk(), r.GetId(), r.GetRunningNs(), r.GetError()}
	}
	return v
}

func viewPolicy(p *apipb.Policy) policyView {
	params := p.GetParams()
	if params == nil {
		params = map[string]string{}
	}
	return policyView{Name: p.GetName(), Path: p.GetPath(), Generation: p.GetGeneration(), SHA256: p.GetSha256(), Params: params,
		Wanted: p.GetWanted(), Trouble: p.GetTrouble(), Decisions: p.GetDecisions(), PID: p.GetPid()}
}

func viewDecision(d *apipb.Decision) decisionView {
	return decisionView{Mode: d.GetMode(), Engine: d.GetEngine(), AtNS: d.GetAtNs(), At: instant(d.GetAtNs()), Reason: d.GetReason(),
		IntervalNS: d.GetIntervalNs(), Generation: d.GetGeneration(), Policy: d.GetPolicy(), Source: d.GetSource()}
}

// instant is a time for scripts; empty for none.
func instant(ns int64) string {
	if ns == 0 {
		return ""
	}
	return time.Unix(0, ns).UTC().Format(time.RFC3339Nano)
}
