package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"
)

func newVMsCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "vms", Short: "List the VMs that are protected, and those that are gone", Args: exactArgs(0, "no argument"),
		RunE: func(c *cobra.Command, _ []string) error { return runVMs(c, a) },
	}
}

func runVMs(c *cobra.Command, a *app) (err error) {
	all, err := a.everybody(c.Context())
	if err != nil {
		return err
	}
	views, rows := []statusView{}, [][]string{}
	for _, p := range all {
		for _, s := range p.vms {
			v := viewStatus(s)
			views = append(views, v)
			rows = append(rows, []string{v.VM, fmt.Sprint(v.QEMUPID), v.State, yesNo(v.Protected), dash(v.Policy.Name),
				dash(v.LastSuccess), durationText(time.Duration(v.RPONS)), fmt.Sprint(v.Checkpoints), fmt.Sprint(len(v.Degraded))})
		}
		err = errors.Join(err, p.conn.Close())
	}
	if a.json {
		a.print("vms", struct {
			Schema string       `json:"schema"`
			VMs    []statusView `json:"vms"`
		}{schema("vms"), views})
		return err
	}
	a.table([]string{"VM", "PID", "STATE", "PROTECTED", "POLICY", "LAST", "AT RISK", "TAKEN", "TROUBLES"}, rows)
	return err
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
