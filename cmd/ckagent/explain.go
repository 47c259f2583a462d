package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/capture/proving"
	"github.com/ckagent/ckagent/agent/vm"
	"github.com/ckagent/ckagent/agent/vm/inject"
)

type explainOptions struct{ qmp string }

func newExplainCommand(a *app) *cobra.Command {
	var o explainOptions
	c := &cobra.Command{
		Use: "explain QEMU-PID", Short: "Say what protecting a VM would take, without touching it", Args: exactArgs(1, "the pid of a QEMU process"),
		RunE: func(c *cobra.Command, args []string) error { return runExplain(c, a, o, args[0]) },
	}
	c.Flags().StringVar(&o.qmp, "qmp", "", "address of the QMP monitor (default: found from the process)")
	return c
}

// explanation is everything that would matter to a checkpoint.
type explanation struct {
	Schema     string         `json:"schema"`
	PID        int            `json:"qemu_pid"`
	VM         string         `json:"vm"`
	QEMU       string         `json:"qemu"`
	Machine    string         `json:"machine"`
	Accel      string         `json:"accel"`
	VCPUs      int            `json:"vcpus"`
	QMP        string         `json:"qmp"`
	State      string         `json:"state"`
	Protected  bool           `json:"can_protect"`
	Mode       capture.Mode   `json:"mode"`
	Engine     capture.Engine `json:"engine"`
	Reason     string         `json:"reason"`
	Refusals   []vm.Refusal   `json:"refusals"`
	Changes    []vm.Change    `json:"changes"`
	Blocks     []vm.RAMBlock  `json:"blocks"`
	Prediction vm.Prediction  `json:"prediction"`
}

func runExplain(c *cobra.Command, a *app, o explainOptions, arg string) error {
	pid, err := parsePID(arg)
	if err != nil {
		return err
	}
	e, err := explain(c.Context(), pid, o.qmp)
	if err != nil {
		return err
	}
	if a.json {
		a.print("explain", e)
		return nil
	}
	printExplanation(a, e)
	return nil
}

func explain(ctx context.Context, pid int, qmp string) (e *explanation, err error) {
	t, err := vm.Open(ctx, pid, vm.Options{QMP: qmp})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, t.Close()) }()
	status, err := t.Status(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := t.Layout(ctx); err != nil {
		return nil, err
	}
	refusals, err := t.Refusals(ctx)
	if err != nil {
		return nil, err
	}
	m, err := t.Describe(ctx)
	if err != nil {
		return nil, err
	}
	p, err := vm.PredictPause(ctx, t)
	if err != nil {
		return nil, err
	}
	e = &explanation{Schema: schema("explain"), PID: pid, VM: t.Name, QEMU: t.Version.String(), Machine: t.Machine,
		Accel: t.Accel, VCPUs: len(t.VCPUs), QMP: t.Endpoint.String(), State: status.State,
		Refusals: append(append([]vm.Refusal{}, refusals...), m.Refusals...), Changes: m.Changes, Blocks: t.Blocks, Prediction: p}
	e.Mode, e.Engine, e.Reason = capture.Choose(ctx, t, capture.Options{Proofs: proving.New(nil)})
	if e.Mode == capture.COW {
		if err := inject.CanTrace(pid); err != nil {
			e.Mode, e.Engine, e.Reason = capture.Stop, capture.EngineNone, err.Error()
		}
	}
	e.Protected = len(e.Refusals) == 0
	return e, nil
}

func printExplanation(a *app, e *explanation) {
	fmt.Fprintf(a.out, "VM %s, pid %d: QEMU %s, %s, accel %s, %d vCPUs, %s; monitor %s\n",
		dash(e.VM), e.PID, e.QEMU, e.Machine, e.Accel, e.VCPUs, e.State, e.QMP)
	for _, r := range e.Refusals {
		fmt.Fprintf(a.out, "refused  [%s] %s: %s\n         %s\n", r.Code, r.Object, r.Reason, r.Advice)
	}
	if e.Protected {
		fmt.Fprintf(a.out, "can be protected: mode %s, engine %s%s\n", e.Mode, e.Engine, prefixed("; ", e.Reason))
	}
	for _, ch := range e.Changes {
		fmt.Fprintf(a.out, "changed  %s %q -> %q: %s\n", ch.Kind, ch.Old, ch.New, ch.Reason)
	}
	p := e.Prediction
	pause := p.Pause
	if e.Mode != capture.COW {
		pause += p.CopyInPause
	}
	fmt.Fprintf(a.out, "predicted pause %s (device state %s), at most %s to store of %s RAM\n",
		durationText(pause), durationText(p.DeviceState), sizeText(p.UsedBytes), sizeText(p.TotalBytes))
	for _, h := range p.How {
		fmt.Fprintf(a.out, "         %s\n", h)
	}
	rows := [][]string{}
	for _, b := range e.Blocks {
		rows = append(rows, []string{b.Name, sizeText(b.UsedBytes), fmt.Sprintf("%#x", b.HVA), string(b.Backing), b.FileType, b.How})
	}
	a.table([]string{"BLOCK", "USED", "ADDRESS", "BACKING", "ON", "FOUND BY"}, rows)
}

func prefixed(prefix, s string) string {
	if s == "" {
		return ""
	}
	return prefix + s
}
