package daemon

import (
	"context"
	"encoding/json"
	"time"

	"google.golang.org/grpc"

	"github.com/ckagent/ckagent/agent"
	"github.com/ckagent/ckagent/agent/api"
	"github.com/ckagent/ckagent/agent/api/apipb"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/procstat"
)

// service answers on the control sockets. What is a VM's own is agent.Control's.
type service struct {
	*agent.Control
	d *Daemon
}

// Status lists VMs: those that are protected, and those that are gone and may be
// restored.
func (s *service) Status(_ context.Context, r *apipb.StatusRequest) (*apipb.StatusReply, error) {
	reply := &apipb.StatusReply{}
	for _, w := range s.d.all() {
		if r.GetVm() == "" || w.is(r.GetVm()) {
			reply.Vms = append(reply.Vms, w.status())
		}
	}
	for _, g := range s.d.departed() {
		if r.GetVm() == "" || agent.Names(r.GetVm(), g.Name, g.PID) {
			reply.Vms = append(reply.Vms, &apipb.VMStatus{Vm: g.Name, QemuPid: int32(g.PID), State: "ended", Ended: g.Ending, Rehearsal: g.Rehearsal,
				Store: g.Spec.GetStore(), OnDeath: g.Spec.GetOnDeath(), Degraded: []string{"ended, " + g.Ending.GetHow() + ": " + g.Ending.GetDetail()}})
		}
	}
	if r.GetVm() != "" && len(reply.Vms) == 0 {
		return nil, s.unknown(r.GetVm())
	}
	return reply, nil
}

func (s *service) unknown(ref string) error {
	return api.ToStatus(problem.New(problem.NotFound, "find VM", ref, "the daemon does not protect such a VM").
		WithHint("ckagent vms lists those it does; ckagent attach QEMU-PID adds one"))
}

func (w *ward) is(ref string) bool { return agent.Names(ref, w.name, w.pid()) }

// find is the ward of a reference.
func (s *service) find(ref string) (*ward, error) {
	for _, w := range s.d.all() {
		if w.is(ref) {
			return w, nil
		}
	}
	return nil, s.unknown(ref)
}

// Attach protects another VM.
func (s *service) Attach(r *apipb.AttachRequest, stream apipb.Agent_AttachServer) error {
	ctx := stream.Context()
	spec := s.d.complete(r.GetSpec())
	if _, _, err := agent.Planned(spec); err != nil {
		return api.ToStatus(err)
	}
	pid := int(r.GetQemuPid())
	name, err := agent.NameOf(pid, spec.GetName())
	if err != nil {
		return api.ToStatus(err)
	}
	st, err := procstat.Read(pid)
	if err != nil {
		return api.ToStatus(problem.New(problem.NotFound, "attach", "", "%w", err))
	}
	if err := stream.Send(&apipb.AttachEvent{Step: "attach"}); err != nil {
		return err
	}
	w, err := s.d.admit(Record{Name: name, PID: pid, StartTicks: st.StartTicks, BootID: s.d.boot, Since: time.Now(), Spec: spec}, false)
	if err != nil {
		return api.ToStatus(err)
	}
	select {
	case <-w.ready:
	case <-ctx.Done():
		return ctx.Err() // it goes on: the client has gone, not its wish
	}
	if err := w.failure(); err != nil {
		return api.ToStatus(err)
	}
	return stream.Send(&apipb.AttachEvent{Step: "protected", Protected: w.status()})
}

// SetPolicy replaces a VM's policy and remembers it.
func (s *service) SetPolicy(ctx context.Context, r *apipb.SetPolicyRequest) (*apipb.SetPolicyReply, error) {
	w, err := s.find(r.GetVm())
	if err != nil {
		return nil, err
	}
	p := w.protector()
	if p == nil {
		return nil, api.ToStatus(problem.New(problem.Busy, "set policy", "VM "+w.name, "it is not attached to yet"))
	}
	v, err := w.setPolicy(ctx, p, r.GetPolicy(), r.GetParams())
	if err != nil {
		return nil, api.ToStatus(err)
	}
	return p.PolicyReply(v), nil
}

// Detach lets a VM go, attached to or not.
func (s *service) Detach(ctx context.Context, r *apipb.DetachRequest) (*apipb.DetachReply, error) {
	w, err := s.find(r.GetVm())
	if err != nil {
		found, failed := s.d.forgetGone(r.GetVm())
		if failed != nil {
			return nil, api.ToStatus(failed)
		}
		if found {
			return &apipb.DetachReply{}, nil
		}
		return nil, err
	}
	if err := w.detach(ctx); err != nil {
		return nil, api.ToStatus(err)
	}
	return &apipb.DetachReply{}, nil
}

// Top looks at the VMs.
func (s *service) Top(r *apipb.TopRequest, stream apipb.Agent_TopServer) error {
	if s.d.deps.Watch == nil {
		return api.ToStatus(problem.New(problem.Refused, "watch VMs", "", "this daemon watches nothing"))
	}
	interval := max(time.Duration(r.GetIntervalNs()), lookEvery)
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for n := uint32(1); ; n++ {
		text, err := json.Marshal(s.d.snapshot())
		if err != nil {
			return api.ToStatus(err)
		}
		if err := stream.Send(&apipb.TopReply{Snapshot: string(text)}); err != nil {
			return err
		}
		if n == r.GetCount() {
			return nil
		}
		select {
		case <-tick.C:
		case <-stream.Context().Done():
			return nil
		case <-s.d.ctx.Done():
			return nil
		}
	}
}

// readOnly lets nothing pass but what changes nothing.
func readOnly(method string) error {
	switch method {
	case apipb.Agent_Status_FullMethodName, apipb.Agent_Top_FullMethodName:
		return nil
	}
	return api.ToStatus(problem.New(problem.Refused, "ask the daemon", "", "this socket answers vms, status and top alone").
		WithHint("the control socket is for root and the group of its file"))
}

// readOnlyServer is a server that does not let others pass.
func readOnlyServer() *grpc.Server {
	return api.NewServer(
		grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			if err := readOnly(info.FullMethod); err != nil {
				return nil, err
			}
			return next(ctx, req)
		}),
		grpc.StreamInterceptor(func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			if err := readOnly(info.FullMethod); err != nil {
				return err
			}
			return next(srv, stream)
		}))
}
