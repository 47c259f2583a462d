package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/ckagent/ckagent/agent/api"
	"github.com/ckagent/ckagent/agent/api/apipb"
	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/controller"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/plugins"
)

// Control answers on a control socket for the VMs that are protected behind it.
type Control struct {
	apipb.UnimplementedAgentServer
	vms func() []*Protector
}

// NewControl is the service of the protectors that vms returns, in the order in which
// they are listed.
func NewControl(vms func() []*Protector) *Control { return &Control{vms: vms} }

// Is reports whether a VM is meant by a reference: its name, vm:NAME, or a pid.
func (p *Protector) Is(ref string) bool { return Names(ref, p.v.Name, p.v.pid) }

// PID is the VM's process.
func (p *Protector) PID() int { return p.v.pid }

// Names reports whether a reference means the VM of this name and pid.
func Names(ref, name string, pid int) bool {
	own, _ := strings.CutPrefix(ref, "vm:")
	return own == name || ref == strconv.Itoa(pid)
}

// PolicyReply is the answer to who set a policy.
func (p *Protector) PolicyReply(v plugins.Verdict) *apipb.SetPolicyReply {
	return &apipb.SetPolicyReply{Policy: policyStatus(p.p.Slot.Status()), Decision: decisionStatus(v, time.Now())}
}

// find is the VM that is meant; an empty reference means the only one.
func (c *Control) find(ref string) (*Protector, error) {
	const op = "find VM"
	all := c.vms()
	if ref == "" && len(all) == 1 {
		return all[0], nil
	}
	var names []string
	for _, p := range all {
		if ref != "" && p.Is(ref) {
			return p, nil
		}
		names = append(names, p.v.Name)
	}
	if ref == "" {
		return nil, api.ToStatus(problem.New(problem.Usage, op, "", "%d VMs are protected here: say which", len(all)))
	}
	return nil, api.ToStatus(problem.New(problem.NotFound, op, ref, "protected here: %s", strings.Join(names, ", ")).
		WithHint("ckagent vms lists them; ckagent attach QEMU-PID adds one"))
}

// Status implements the service, as do the methods below.
func (c *Control) Status(_ context.Context, r *apipb.StatusRequest) (*apipb.StatusReply, error) {
	all := c.vms()
	if r.GetVm() != "" {
		p, err := c.find(r.GetVm())
		if err != nil {
			return nil, err
		}
		all = []*Protector{p}
	}
	reply := &apipb.StatusReply{}
	for _, p := range all {
		reply.Vms = append(reply.Vms, p.Status())
	}
	return reply, nil
}

func (c *Control) Checkpoint(r *apipb.CheckpointRequest, stream apipb.Agent_CheckpointServer) error {
	p, err := c.find(r.GetVm())
	if err != nil {
		return err
	}
	// The VM's goroutine does not wait for a client that does not read.
	events := make(chan capture.Event, 64)
	type end struct {
		res *capture.Result
		err error
	}
	ended := make(chan end, 1)
	go func() { // ends with the checkpoint, or when the client has gone
		res, err := p.Checkpoint(stream.Context(), func(e capture.Event) {
			select {
			case events <- e:
			default:
			}
		})
		ended <- end{res, err}
	}()
	for {
		select {
		case e := <-events:
			if err := stream.Send(&apipb.CheckpointEvent{Step: e.Step, Detail: e.Detail}); err != nil {
				<-ended
				return err
			}
		case e := <-ended:
			if e.err != nil {
				return api.ToStatus(e.err)
			}
			all, err := json.Marshal(e.res)
			if err != nil {
				return err
			}
			m := e.res.Manifest
			return stream.Send(&apipb.CheckpointEvent{Taken: &apipb.Checkpoint{Id: m.ID, Vm: m.VM, QemuPid: int32(e.res.PID), Mode: m.Mode,
				Engine: m.Engine, Parent: m.Parent, RamBytes: m.Stats.RAMBytes, PageBytes: m.Blocks[0].PageBytes, Pages: m.Stats.Pages,
				ZeroPages: m.Stats.ZeroPages, CapturedPages: m.Stats.CapturedPages, StoredBytes: m.Stats.StoredBytes,
				PauseNs: m.Stats.PauseNS, ArmNs: m.Stats.ArmNS, DeviceStateNs: m.Stats.DeviceStateNS, TotalNs: m.Stats.TotalNS, Result: all}})
		}
	}
}

func (c *Control) SetPolicy(ctx context.Context, r *apipb.SetPolicyRequest) (*apipb.SetPolicyReply, error) {
	p, err := c.find(r.GetVm())
	if err != nil {
		return nil, err
	}
	v, err := p.SetPolicy(ctx, r.GetPolicy(), r.GetParams())
	if err != nil {
		return nil, api.ToStatus(err)
	}
	return p.PolicyReply(v), nil
}

func (c *Control) Cancel(ctx context.Context, r *apipb.CancelRequest) (*apipb.CancelReply, error) {
	p, err := c.find(r.GetVm())
	if err != nil {
		return nil, err
	}
	under, err := p.Cancel(ctx)
	if err != nil {
		return nil, api.ToStatus(err)
	}
	return &apipb.CancelReply{Cancelled: under}, nil
}

func (c *Control) Detach(ctx context.Context, r *apipb.DetachRequest) (*apipb.DetachReply, error) {
	p, err := c.find(r.GetVm())
	if err != nil {
		return nil, err
	}
	if err := p.Detach(ctx); err != nil {
		return nil, api.ToStatus(err)
	}
	return &apipb.DetachReply{}, nil
}

// Status is what is to be seen of a protection now.
func (p *Protector) Status() *apipb.VMStatus {
	slot := p.p.Slot.Status()
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	r := &p.record
	s := &apipb.VMStatus{Vm: p.v.Name, QemuPid: int32(p.v.pid), State: p.state.String(), Policy: policyStatus(slot),
		Decision: decisionStatus(p.verdict, p.made), LastCheckpoint: r.newest, SinceNs: r.since.UnixNano(),
		Checkpoints: r.taken, Failures: r.failures, LastError: r.lastError, Ended: p.ending}
	if !p.due.IsZero() {
		s.NextAtNs = p.due.UnixNano()
	}
	if !r.success.IsZero() {
		s.LastSuccessNs, s.RpoNs = r.success.UnixNano(), int64(now.Sub(r.success))
		// One that is being taken or tried again counts as late after another interval.
		s.Protected = !p.state.Final() && now.Sub(r.success) < 2*max(p.interval, lateAfter)
	}
	if w := p.v.witness; w.wanted && p.state == controller.Idle && !w.hearing.Load() {
		s.Degraded = append(s.Degraded, "nobody listens for the VM's end: its monitor is in other hands, and what is not heard is not restored")
	}
	if slot.Trouble != nil {
		s.Degraded = append(s.Degraded, "policy: "+slot.Trouble.Error())
	}
	if n := len(r.retaken); n > 0 {
		s.Degraded = append(s.Degraded, fmt.Sprintf("the newest checkpoint was taken at attempt %d: %s", n+1, r.retaken[n-1]))
	}
	if r.failures > 0 {
		s.Degraded = append(s.Degraded, "checkpoints fail: "+r.lastError)
	}
	return s
}

// lateAfter keeps short intervals from being called late because of one slow
// checkpoint.
const lateAfter = 30 * time.Second

func policyStatus(s plugins.Status) *apipb.Policy {
	p := &apipb.Policy{Name: s.Policy, Path: s.Path, Generation: s.Generation, Sha256: s.SHA256, Params: s.Params,
		Wanted: s.Wanted, Decisions: s.Decisions, Pid: int32(s.PID)}
	if s.Trouble != nil {
		p.Trouble = s.Trouble.Error()
	}
	return p
}

func decisionStatus(v plugins.Verdict, made time.Time) *apipb.Decision {
	d := v.Decision
	if d == nil {
		return nil
	}
	at := d.GetAtNs()
	switch {
	case d.GetNow():
		at = made.UnixNano()
	case d.GetIdleSlot() != nil:
		at = d.GetIdleSlot().GetDeadlineNs()
	}
	return &apipb.Decision{Mode: d.GetMode(), Engine: d.GetEngine(), AtNs: at, Reason: d.GetReason(), IntervalNs: d.GetIntervalNs(),
		Generation: v.Generation, Policy: v.Policy, MadeNs: made.UnixNano(), Source: string(v.Source)}
}
