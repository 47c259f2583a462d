package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent/api"
	"github.com/ckagent/ckagent/agent/api/apipb"
)

func newPolicySetCommand(a *app) *cobra.Command {
	var params []string
	c := &cobra.Command{
		Use: "set VM NAME|PATH", Short: "Replace the policy of a protected VM while everything goes on",
		Long: "Replace the policy of a protected VM. The new one is started, and decides once on what is known now,\n" +
			"before it takes the place of the other; if it does not come to that, the other stays. Checkpoints go on.",
		Args: exactArgs(2, "a VM and a policy"),
		RunE: func(c *cobra.Command, args []string) error { return runPolicySet(c, a, params, args[0], args[1]) },
	}
	paramFlag(c, &params)
	return c
}

func runPolicySet(c *cobra.Command, a *app, list []string, ref, policy string) (err error) {
	params, err := parseParams(list)
	if err != nil {
		return err
	}
	vm, err := a.findProtected(c.Context(), ref)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, vm.conn.Close()) }()
	r, err := vm.SetPolicy(c.Context(), &apipb.SetPolicyRequest{Vm: vm.status.GetVm(), Policy: policy, Params: params})
	if err != nil {
		return api.FromStatus("set policy", err)
	}
	if a.json {
		a.print("policy", struct {
			Schema   string       `json:"schema"`
			VM       string       `json:"vm"`
			Policy   policyView   `json:"policy"`
			Decision decisionView `json:"decision"`
		}{schema("policy-set"), vm.status.GetVm(), viewPolicy(r.GetPolicy()), viewDecision(r.GetDecision())})
		return nil
	}
	fmt.Fprintf(a.out, "%s: policy %s, generation %d: %s\n", vm.status.GetVm(), r.GetPolicy().GetName(), r.GetPolicy().GetGeneration(), r.GetDecision().GetReason())
	if at := r.GetDecision().GetAtNs(); at != 0 {
		fmt.Fprintf(a.out, "next checkpoint %s\n", time.Unix(0, at).Format(time.DateTime))
	}
	return nil
}
