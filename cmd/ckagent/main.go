package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/api"
	"github.com/ckagent/ckagent/agent/problem"
)

func main() {
	if code, ok := helperMain(os.Args[1:]); ok {
		os.Exit(code)
	}
	moreThreads()
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// moreThreads lets more threads run Go code than there are processors: a beat is not to
// wait for a thread that computes checksums and was itself put off by the host.
func moreThreads() { runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + 2) }

// run is the whole program but for the process: tests call it.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	a := &app{args: args, out: stdout, err: stderr}
	root := newRootCommand(a)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	verb, err := root.ExecuteContextC(ctx)
	if err != nil && ctx.Err() != nil {
		err = interrupted(verb.Name(), err)
	}
	a.fail(err)
	return problem.ExitCode(err)
}

// app is what all verbs share.
type app struct {
	args     []string
	out, err io.Writer
	json     bool
	verbose  bool
	socket   string // --socket; "": see client.go
	log      *slog.Logger
}

func newRootCommand(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:           "ckagent",
		Short:         "Checkpoint running QEMU virtual machines, restore them in milliseconds",
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRun: func(*cobra.Command, []string) {
			level := slog.LevelInfo
			if a.verbose {
				level = slog.LevelDebug
			}
			a.log = slog.New(slog.NewTextHandler(a.err, &slog.HandlerOptions{Level: level}))
		},
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError("unknown verb %q", args[0])
			}
			return c.Help()
		},
		Args: cobra.ArbitraryArgs,
	}
	root.PersistentFlags().BoolVar(&a.json, "json", false, "print one JSON object on stdout and nothing else there")
	root.PersistentFlags().BoolVarP(&a.verbose, "verbose", "v", false, "log more to stderr")
	root.PersistentFlags().StringVar(&a.socket, "socket", "", "control socket of the daemon, or tls://HOST:PORT (default: "+socketVariable+", else "+api.DaemonSocket+")")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error {
		// Parsing ended at the flag that is wrong; the form of the answer may have
		// been asked for behind it.
		a.json = a.json || wantsJSON(a.args)
		return usageError("%w", err)
	})
	root.AddCommand(
		newDoctorCommand(a), newExplainCommand(a), newDirtyRateCommand(a), newTopCommand(a),
		newAttachCommand(a), newDaemonCommand(a), newVMsCommand(a), newStatusCommand(a), newCancelCommand(a), newPolicyCommand(a),
		newCheckpointCommand(a), newReleaseCommand(a), newDetachCommand(a),
		newLsCommand(a), newInspectCommand(a), newVerifyCommand(a),
		newRmCommand(a), newGCCommand(a), newMergeCommand(a), newPinCommand(a), newUnpinCommand(a),
		newRestoreCommand(a), newRehearseCommand(a), newPageCommand(a),
		newExportCommand(a), newImportCommand(a),
		newDemoCommand(a), newVersionCommand(a),
	)
	return root
}

func wantsJSON(args []string) bool {
	for _, arg := range args {
		switch arg {
		case "--json", "--json=true":
			return true
		case "--":
			return false
		}
	}
	return false
}

func usageError(format string, args ...any) error {
	return problem.New(problem.Usage, "ckagent", "", format, args...).WithHint("ckagent help VERB shows how")
}

// exactArgs is cobra.ExactArgs with our exit code.
func exactArgs(n int, what string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) != n {
			return usageError("want %s, got %d arguments", what, len(args))
		}
		return nil
	}
}

// fail prints an error, once, in the form that was asked for.
func (a *app) fail(err error) {
	if err == nil {
		return
	}
	if !a.json {
		fmt.Fprintf(a.err, "ckagent: %s\n", oneLine(err.Error()))
		return
	}
	type failure struct {
		Code      problem.Code `json:"code"`
		Op        string       `json:"op"`
		Object    string       `json:"object,omitempty"`
		Message   string       `json:"message"`
		Hint      string       `json:"hint,omitempty"`
		Retryable bool         `json:"retryable"`
	}
	f := failure{Code: problem.CodeOf(err), Op: "ckagent", Message: oneLine(err.Error())}
	if p, ok := errors.AsType[*problem.Error](err); ok {
		f.Op, f.Object, f.Hint, f.Retryable = p.Op, p.Object, p.Hint, p.Retryable
	}
	a.print("error", struct {
		Schema string  `json:"schema"`
		Error  failure `json:"error"`
	}{schema("error"), f})
}
