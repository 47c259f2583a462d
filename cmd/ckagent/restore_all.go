package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent"
	"github.com/ckagent/ckagent/agent/daemon"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/restore"
)

// allResult is what became of one VM of `restore --all`.
type allResult struct {
	VM      string       `json:"vm"`
	How     string       `json:"ended"`
	QEMUPID int          `json:"qemu_pid"`
	ID      string       `json:"id"`
	Code    problem.Code `json:"code"` // ok, or why not
	Message string       `json:"message"`
}

// runRestoreAll brings back every protected VM that is gone and was not ended on
// purpose, and has it protected again, by the daemon that runs or by the next.
func runRestoreAll(c *cobra.Command, a *app, o *restoreOptions) error {
	ctx := c.Context()
	cfg, err := (&daemonOptions{config: o.config, state: o.stateDir}).load(a)
	if err != nil {
		return err
	}
	records, err := daemon.ReadRecords(cfg.StateDir)
	var failed []error
	if err != nil {
		failed = append(failed, err) // the others are brought back all the same
	}
	list := []allResult{}
	for _, r := range records {
		if r.Alive() {
			continue
		}
		out := allResult{VM: r.Name, How: r.Ending.GetHow(), Code: "ok"}
		switch out.How {
		case "poweroff", "destroyed", "migrated":
			out.Code, out.Message = problem.Refused, "it was ended on purpose; ckagent restore "+r.Name+" brings it back nevertheless"
		default:
			res, err := a.restoreRecord(ctx, o, cfg, r)
			if res != nil {
				out.QEMUPID, out.ID = res.QEMUPID, res.ID
			}
			if err != nil {
				out.Code, out.Message = problem.CodeOf(err), err.Error()
				failed = append(failed, err)
			}
		}
		list = append(list, out)
	}
	if len(failed) > 0 && len(list) == 0 {
		return errors.Join(failed...)
	}
	if a.json && len(failed) == 0 {
		a.print("restore-all", struct {
			Schema string      `json:"schema"`
			VMs    []allResult `json:"vms"`
		}{schema("restore-all"), list})
		return nil
	}
	if !a.json {
		rows := [][]string{}
		for _, r := range list {
			rows = append(rows, []string{r.VM, dash(r.How), fmt.Sprint(r.QEMUPID), dash(r.ID), string(r.Code), oneLine(r.Message)})
		}
		a.table([]string{"VM", "ENDED", "PID", "CHECKPOINT", "", ""}, rows)
	}
	return errors.Join(failed...)
}

// restoreRecord brings one VM back, and has it protected.
func (a *app) restoreRecord(ctx context.Context, o *restoreOptions, cfg daemon.Config, r daemon.Record) (*restore.Result, error) {
	dir := r.Spec.GetStore()
	if dir == "" {
		dir = agent.DefaultStore
	}
	st, err := store.Open(dir)
	if err != nil {
		return nil, err
	}
	ro, err := o.options(nil)
	if err != nil {
		return nil, err
	}
	ro.Detach = true
	res, err := restore.Run(ctx, st, "vm:"+r.Name, ro) // a name alone may be the beginning of an id
	if res == nil {
		return nil, err
	}
	for _, n := range res.Notes {
		a.log.Warn(n, "vm", r.Name)
	}
	r.Adopt(res.QEMUPID)
	d, derr := a.daemon(ctx)
	if derr != nil { // the next daemon takes it up
		return res, errors.Join(err, daemon.Leave(cfg.StateDir, r))
	}
	return res, errors.Join(err, a.handOver(ctx, d, r.Spec, res.QEMUPID), d.conn.Close())
}
