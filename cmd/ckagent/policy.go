package main

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent/cgroup"
	"github.com/ckagent/ckagent/plugins"
	"github.com/ckagent/ckagent/plugins/policy"
)

func newPolicyCommand(a *app) *cobra.Command {
	c := &cobra.Command{
		Use: "policy", Short: "Programs that decide when and how VMs are checkpointed",
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError("unknown verb policy %q", args[0])
			}
			return c.Help()
		},
		Args: cobra.ArbitraryArgs,
	}
	var dir string
	c.PersistentFlags().StringVar(&dir, "policy-dir", "", policyDirHelp)
	c.AddCommand(newPolicyListCommand(a, &dir), newPolicyInstallCommand(a, &dir), newPolicyDescribeCommand(a, &dir),
		newPolicySetCommand(a), newPolicyRecordCommand(a), newPolicyReplayCommand(a, &dir))
	return c
}

const policyDirHelp = "directory of the installed policies (default: " + plugins.DirVariable + ", else " + plugins.DefaultDir + ")"

// programView is an installed policy.
type programView struct {
	Name   string `json:"name"`
	Path   string `json:"path"`
	SHA256 string `json:"sha256"`
}

func newPolicyListCommand(a *app, dir *string) *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List the installed policies", Args: exactArgs(0, "no argument"),
		RunE: func(*cobra.Command, []string) error { return runPolicyList(a, *dir) },
	}
}

func runPolicyList(a *app, dir string) error {
	r := plugins.NewRegistry(dir)
	// A program that somebody changed is an error; the others are still listed.
	list, err := r.List()
	views := make([]programView, 0, len(list))
	rows := make([][]string, 0, len(list))
	for _, p := range list {
		views = append(views, programView(p))
		rows = append(rows, []string{p.Name, p.SHA256[:12], p.Path})
	}
	switch {
	case a.json && err == nil:
		a.print("policies", struct {
			Schema   string        `json:"schema"`
			Dir      string        `json:"dir"`
			Policies []programView `json:"policies"`
		}{schema("policy-list"), r.Dir(), views})
	case !a.json:
		a.table([]string{"NAME", "SHA-256", "PATH"}, rows)
	}
	return err
}

func newPolicyInstallCommand(a *app, dir *string) *cobra.Command {
	return &cobra.Command{
		Use: "install PATH...", Short: "Install programs as policies, with their checksums",
		Long: "Copy programs into the directory that policies are run from, and record their checksums. A program\n" +
			"is called as its file is, without \"ckagent-policy-\" and without an extension; one of the same name is\n" +
			"replaced. A VM whose policy it is gets the new one when its policy is set the next time.",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageError("want the path of a program")
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error { return runPolicyInstall(a, *dir, args) },
	}
}

func runPolicyInstall(a *app, dir string, paths []string) error {
	r := plugins.NewRegistry(dir)
	views := make([]programView, 0, len(paths))
	for _, path := range paths {
		p, err := r.Install(path)
		if err != nil {
			return err
		}
		views = append(views, programView(p))
		if !a.json {
			fmt.Fprintf(a.out, "%s is installed as %s\n", path, p.Path)
		}
	}
	if a.json {
		a.print("installed", struct {
			Schema   string        `json:"schema"`
			Policies []programView `json:"policies"`
		}{schema("policy-install"), views})
	}
	return nil
}

func newPolicyDescribeCommand(a *app, dir *string) *cobra.Command {
	var params []string
	c := &cobra.Command{
		Use: "describe NAME", Short: "Show what a policy computes and its parameters", Args: exactArgs(1, "a policy"),
		RunE: func(c *cobra.Command, args []string) error { return runPolicyDescribe(c, a, *dir, params, args[0]) },
	}
	paramFlag(c, &params)
	return c
}

// paramFlag adds --param k=v.
func paramFlag(c *cobra.Command, to *[]string) {
	c.Flags().StringArrayVar(to, "param", nil, "parameter of the policy, as NAME=VALUE; may be repeated")
}

func parseParams(list []string) (map[string]string, error) {
	params := map[string]string{}
	for _, p := range list {
		name, value, ok := strings.Cut(p, "=")
		if !ok || name == "" {
			return nil, usageError("--param %q: want NAME=VALUE", p)
		}
		if _, twice := params[name]; twice {
			return nil, usageError("--param %s is given twice", name)
		}
		params[name] = value
	}
	return params, nil
}

// policyHost runs policies in control groups of their own, which are removed with
// them.
func policyHost(a *app) *plugins.Host {
	cgroup.Sweep() // those of policies whose host was killed
	return &plugins.Host{
		Confine: func(pid int) func() {
			name := fmt.Sprintf("policy-%d", pid)
			cgroup.Move(pid, name)
			return func() { cgroup.Remove(name) }
		},
		Line: func(program, text string) { a.log.Info("policy says", "policy", program, "text", text) },
	}
}

type paramView struct {
	Name  string `json:"name"`
	Value string `json:"value"`
	Help  string `json:"help"`
}

// descriptionView is what a policy says of itself.
type descriptionView struct {
	Schema string `json:"schema"`
	programView
	Version string      `json:"version"`
	Formula string      `json:"formula"`
	Source  string      `json:"source"`
	Params  []paramView `json:"params"`
	Modes   []string    `json:"modes"`
}

func runPolicyDescribe(c *cobra.Command, a *app, dir string, list []string, ref string) error {
	params, err := parseParams(list)
	if err != nil {
		return err
	}
	p, err := plugins.NewRegistry(dir).Lookup(ref)
	if err != nil {
		return err
	}
	g, err := policyHost(a).Start(c.Context(), p, params)
	if errors.Is(err, plugins.ErrParams) {
		return usageError("%w", err)
	}
	if err != nil {
		return err
	}
	d := g.Description
	g.End()
	if a.json {
		a.print("description", viewDescription(p, d))
		return nil
	}
	fmt.Fprintf(a.out, "name     %s, version %s, %s\nformula  %s\nsource   %s\n", p.Name, dash(d.GetVersion()), p.Path, dash(d.GetFormula()), dash(d.GetSource()))
	if len(d.GetModes()) > 0 {
		fmt.Fprintf(a.out, "modes    %s\n", strings.Join(d.GetModes(), ", "))
	}
	rows := make([][]string, 0, len(d.GetParams()))
	for _, p := range d.GetParams() {
		rows = append(rows, []string{p.GetName(), p.GetValue(), p.GetHelp()})
	}
	a.table([]string{"PARAMETER", "VALUE", ""}, rows)
	return nil
}

func viewDescription(p plugins.Program, d *policy.Description) descriptionView {
	v := descriptionView{Schema: schema("policy-describe"), programView: programView(p), Version: d.GetVersion(),
		Formula: d.GetFormula(), Source: d.GetSource(), Params: []paramView{}, Modes: append([]string{}, d.GetModes()...)}
	for _, p := range d.GetParams() {
		v.Params = append(v.Params, paramView{p.GetName(), p.GetValue(), p.GetHelp()})
	}
	return v
}

// paramText is parameters as they are given.
func paramText(params map[string]string) string {
	var list []string
	for _, k := range slices.Sorted(maps.Keys(params)) {
		list = append(list, k+"="+params[k])
	}
	return strings.Join(list, " ")
}
