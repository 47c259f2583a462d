package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent"
	"github.com/ckagent/ckagent/agent/api"
	"github.com/ckagent/ckagent/agent/api/apipb"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/vm"
	"github.com/ckagent/ckagent/agent/vm/disk"
)

type detachOptions struct {
	all bool
	qmp string
}

func newDetachCommand(a *app) *cobra.Command {
	var o detachOptions
	c := &cobra.Command{
		Use: "detach VM|QEMU-PID|--all", Short: "End a VM's protection, and remove everything checkpoints keep in its disks",
		Long: "End the protection of a running VM, by a daemon or an attach, and remove everything that checkpoints keep in the block layer of a running VM: the bitmaps of what\n" +
			"changed since the last one, and whatever an interrupted one left. The next checkpoint copies every\n" +
			"disk whole. Checkpoints in the store are not touched.",
		Args: func(_ *cobra.Command, args []string) error {
			if o.all == (len(args) == 1) || len(args) > 1 {
				return usageError("want a VM, a pid or --all")
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error { return runDetach(c, a, o, args) },
	}
	c.Flags().BoolVar(&o.all, "all", false, "all QEMU processes of this host that have a monitor")
	c.Flags().StringVar(&o.qmp, "qmp", "", "address of the QMP monitor (default: found from the process)")
	return c
}

// detached is what was removed from one VM.
type detached struct {
	QEMUPID int `json:"qemu_pid"`
	disk.Swept
}

func runDetach(c *cobra.Command, a *app, o detachOptions, args []string) error {
	pids, err := a.unprotect(c.Context(), o, args)
	if err != nil {
		return err
	}
	if pids == nil {
		if pids, err = detachPIDs(o, args); err != nil {
			return err
		}
	}
	list, skipped := []detached{}, 0
	var errs []error
	for _, pid := range pids {
		swept, err := agent.Detach(c.Context(), pid, o.qmp)
		switch {
		case err == nil:
			list = append(list, detached{pid, swept})
		case o.all && (problem.Is(err, problem.NotFound) || problem.Is(err, problem.Refused)):
			skipped++ // it ended, or has no monitor: then nothing of ours can be in it
		default:
			errs = append(errs, err)
		}
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	if a.json {
		a.print("detach", struct {
			Schema   string     `json:"schema"`
			Detached []detached `json:"detached"`
			Skipped  int        `json:"skipped"`
		}{schema("detach"), list, skipped})
		return nil
	}
	for _, d := range list {
		fmt.Fprintf(a.out, "pid %d: %s\n", d.QEMUPID, sweptText(d.Swept))
	}
	return nil
}

// unprotect has whoever protects the VM let it go; nil: nobody does.
func (a *app) unprotect(ctx context.Context, o detachOptions, args []string) (pids []int, err error) {
	if o.all {
		return nil, nil // what is protected is busy, and says so
	}
	p, err := a.findProtected(ctx, args[0])
	if problem.Is(err, problem.NotFound) || problem.Is(err, problem.NoDaemon) && a.asked() == "" {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, p.conn.Close()) }()
	if _, err := p.Detach(ctx, &apipb.DetachRequest{Vm: p.status.GetVm()}); err != nil {
		return nil, api.FromStatus("detach", err)
	}
	if pid := int(p.status.GetQemuPid()); p.status.GetEnded() == nil {
		return []int{pid}, nil
	}
	return []int{}, nil
}

func detachPIDs(o detachOptions, args []string) ([]int, error) {
	if o.all {
		return vm.Running()
	}
	if pid, err := strconv.Atoi(args[0]); err == nil && pid > 0 {
		return []int{pid}, nil
	}
	pid, err := agent.FindByName(strings.TrimPrefix(args[0], "vm:"))
	return []int{pid}, err
}

func sweptText(s disk.Swept) string {
	if s.Nothing() {
		return "nothing of ours was in its disks"
	}
	return fmt.Sprintf("%d jobs ended, %d overlays committed, %d filters, %d nodes and %d bitmaps removed", len(s.Jobs), len(s.Overlays), len(s.Filters), len(s.Nodes), len(s.Bitmaps))
}
