package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent/api"
	"github.com/ckagent/ckagent/agent/api/apipb"
)

func newCancelCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "cancel VM", Short: "Give up the checkpoint that a protected VM has under way",
		Long: "Give up the checkpoint that is under way, or waits for its turn. The VM stays protected; its policy says\n" +
			"when the next one is taken. Nothing under way is no error.",
		Args: exactArgs(1, "a VM or the pid of its QEMU"),
		RunE: func(c *cobra.Command, args []string) error { return runCancel(c, a, args[0]) },
	}
}

func runCancel(c *cobra.Command, a *app, ref string) (err error) {
	vm, err := a.findProtected(c.Context(), ref)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, vm.conn.Close()) }()
	r, err := vm.Cancel(c.Context(), &apipb.CancelRequest{Vm: vm.status.GetVm()})
	if err != nil {
		return api.FromStatus("cancel", err)
	}
	if a.json {
		a.print("cancel", struct {
			Schema    string `json:"schema"`
			VM        string `json:"vm"`
			Cancelled bool   `json:"cancelled"`
		}{schema("cancel"), vm.status.GetVm(), r.GetCancelled()})
		return nil
	}
	fmt.Fprintf(a.out, "%s: %s\n", vm.status.GetVm(), map[bool]string{true: "given up", false: "nothing is under way"}[r.GetCancelled()])
	return nil
}
