package agent

import (
	"context"
	"strconv"
	"strings"
	"time"

	"github.com/ckagent/ckagent/agent/api"
	"github.com/ckagent/ckagent/agent/api/apipb"
	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/plugins"
)

// Control answers on the control socket for one VM.
type Control struct {
	apipb.UnimplementedAgentServer
	p *Protector
}

// NewControl is the service of a protector.
func NewControl(p *Protector) *Control { return &Control{p: p} }

// Is reports whether a VM is meant by a reference: its name, vm:NAME, a pid, or empty.
func (p *Protector) Is(ref string) bool {
	name, _ := strings.CutPrefix(ref, "vm:")
	return ref == "" || name == p.v.Name || ref == strconv.Itoa(p.v.pid)
}

func (c *Control) find(ref string) error {
	if c.p.Is(ref) {
		return nil
	}
	return api.ToStatus(problem.New(problem.NotFound, "find VM", ref, "VM %s is protected here", c.p.v.Name))
}

// Status implements the service, as do the methods below.
func (c *Control) Status(_ context.Context, r *apipb.StatusRequest) (*apipb.StatusReply, error) {
	if err := c.find(r.GetVm()); err != nil {
		return nil, err
	}
	return &apipb.StatusReply{Vms: []*apipb.VMStatus{c.p.Status()}}, nil
}

func (c *Control) Checkpoint(r *apipb.CheckpointRequest, stream apipb.Agent_CheckpointServer) error {
	if err := c.find(r.GetVm()); err != nil {
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
		res, err := c.p.Checkpoint(stream.Context(), func(e capture.Event) {
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
			m := e.res.Manifest
			return stream.Send(&apipb.CheckpointEvent{Taken: &apipb.Checkpoint{Id: m.ID, Vm: m.VM, Mode: m.Mode, Engine: m.Engine,
				PauseNs: m.Stats.PauseNS, TotalNs: m.Stats.TotalNS, StoredBytes: m.Stats.StoredBytes}})
		}
	}
}

func (c *Control) SetPolicy(ctx context.Context, r *apipb.SetPolicyRequest) (*apipb.SetPolicyReply, error) {
	if err := c.find(r.GetVm()); err != nil {
		return nil, err
	}
	v, err := c.p.SetPolicy(ctx, r.GetPolicy(), r.GetParams())
	if err != nil {
		return nil, api.ToStatus(err)
	}
	return &apipb.SetPolicyReply{Policy: policyStatus(c.p.p.Slot.Status()), Decision: decisionStatus(v, time.Now())}, nil
}

func (c *Control) Cancel(_ context.Context, r *apipb.CancelRequest) (*apipb.CancelReply, error) {
	if err := c.find(r.GetVm()); err != nil {
		return nil, err
	}
	return &apipb.CancelReply{Cancelled: c.p.Cancel()}, nil
}

func (c *Control) Detach(ctx context.Context, r *apipb.DetachRequest) (*apipb.DetachReply, error) {
	if err := c.find(r.GetVm()); err != nil {
		return nil, err
	}
	if err := c.p.Detach(ctx); err != nil {
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
	s := &apipb.VMStatus{Vm: p.v.Name, QemuPid: int32(p.v.pid), State: "idle", Policy: policyStatus(slot),
		Decision: decisionStatus(p.verdict, p.made), LastCheckpoint: r.newest, SinceNs: r.since.UnixNano(),
		Checkpoints: r.taken, Failures: r.failures, LastError: r.lastError}
	if p.cancel != nil {
		s.State = "checkpoint"
	}
	select {
	case <-p.done:
		s.State = "ended"
	default:
	}
	if !p.next.IsZero() {
		s.NextAtNs = p.next.UnixNano()
	}
	if !r.success.IsZero() {
		s.LastSuccessNs, s.RpoNs = r.success.UnixNano(), int64(now.Sub(r.success))
		// One that is being taken or tried again counts as late after another interval.
		s.Protected = s.State != "ended" && now.Sub(r.success) < 2*max(p.interval, lateAfter)
	}
	if slot.Trouble != nil {
		s.Degraded = append(s.Degraded, "policy: "+slot.Trouble.Error())
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
