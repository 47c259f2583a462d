package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent/capture/proving"
	"github.com/ckagent/ckagent/agent/daemon"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/signals"
)

type daemonOptions struct {
	config, state string
	check         bool
}

func newDaemonCommand(a *app) *cobra.Command {
	var o daemonOptions
	c := &cobra.Command{
		Use: "daemon", Short: "Protect many VMs, and take up those of before", Args: exactArgs(0, "no argument"),
		Long: "Protect the VMs of this host. What is protected is kept on disk, so that a daemon that starts takes up\n" +
			"what the one before it had. attach, detach, vms, status, checkpoint, cancel, policy set and top ask it.",
		RunE: func(c *cobra.Command, _ []string) error { return runDaemon(c.Context(), a, &o) },
	}
	f := c.Flags()
	f.StringVar(&o.config, "config", "", "configuration file (default: "+daemon.DefaultConfig+", if it is there)")
	f.StringVar(&o.state, "state-dir", "", "where to keep what is protected (default: as configured, "+daemon.DefaultStateDir+")")
	f.BoolVar(&o.check, "check", false, "check the configuration, and end")
	return c
}

// load reads the configuration. The file that nobody named need not exist.
func (o *daemonOptions) load(a *app) (daemon.Config, error) {
	path := o.config
	if path == "" {
		path = daemon.DefaultConfig
	}
	cfg, err := daemon.Load(path)
	if problem.Is(err, problem.NotFound) && o.config == "" {
		cfg, err = daemon.Standard(), nil
	}
	if err != nil {
		return cfg, err
	}
	if s := a.asked(); s != "" {
		if cfg.ReadSocket == daemon.Standard().ReadSocket && cfg.Socket == daemon.Standard().Socket {
			cfg.ReadSocket = s + ".read" // beside it, not where another daemon's would be
		}
		cfg.Socket = s
	}
	if o.state != "" {
		cfg.StateDir = o.state
	}
	return cfg, cfg.Check()
}

func runDaemon(ctx context.Context, a *app, o *daemonOptions) error {
	cfg, err := o.load(a)
	if err != nil {
		return err
	}
	if o.check {
		if a.json {
			a.print("config", struct {
				Schema string `json:"schema"`
				Socket string `json:"socket"`
				State  string `json:"state_dir"`
			}{schema("daemon-config"), cfg.Socket, cfg.StateDir})
		}
		return nil
	}
	d, err := daemon.New(cfg, daemon.Deps{Log: a.log, PolicyHost: policyHost(a),
		// Every VM of the host, protected or not, without touching any.
		Watch: func(ctx context.Context) *signals.Watcher { return signals.NewWatcher(ctx, signals.WatchOptions{}) },
		Try:   proving.New(nil).Apart})
	if err != nil {
		return err
	}
	return d.Run(ctx)
}
