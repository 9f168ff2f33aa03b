package main

import (
	"strings"
	"testing"

	"cgmanager/cmd/service"
	"cgmanager/test/harness"
)

// Misuse is found before anything is done, and told with the argument as it was typed.
func TestMisuse(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"start"}, `unexpected argument: "start"`},
		{[]string{"--nosuch"}, "unknown flag: --nosuch"},
		{[]string{"--max-depth", "deep"}, `invalid argument "deep" for "--max-depth" flag: not a number`},
		{[]string{"--max-depth", "0"}, `invalid argument "0" for "--max-depth" flag: must be at least 1`},
		{[]string{"--log-level", "loud"}, `--log-level "loud": error, warning, info or debug`},
		{[]string{"--listen", "sock"}, `--listen: "sock": not an address of the form unix:path=/PATH`},
		{[]string{"--state-dir", "state"}, `--state-dir "state": must be an absolute path`},
		{[]string{"--daemon", "--realtime-policy", "realtime.toml"}, `--realtime-policy "realtime.toml": must be an absolute path`},
		{[]string{"--mount-sockets", "--unmount-sockets"}, "--mount-sockets and --unmount-sockets: one of the two"},
		{[]string{"--max-realtime-priority", "100"}, `invalid argument "100" for "--max-realtime-priority" flag: must be 1 to 99`},
		{[]string{"--max-realtime-priority", "21"}, "--max-realtime-priority 21: must be below --our-realtime-priority, which is 21"},
		{[]string{"--scheduling-policy", "idle"}, `--scheduling-policy "idle": RR or FIFO`},
	} {
		var out, errs strings.Builder
		code := run(c.args, &out, &errs)
		if want := "cgmanager: " + c.want + "\nhint: cgmanager --help lists the flags\n"; code != service.ExitUsage || errs.String() != want || out.Len() > 0 {
			t.Errorf("%q: %d, %q, want %d, %q", c.args, code, errs.String(), service.ExitUsage, want)
		}
	}
}

// TestHelpAndMan: --help and the man page have the same flags.
func TestHelpAndMan(t *testing.T) {
	var help, errs strings.Builder
	if code := run([]string{"--help"}, &help, &errs); code != service.ExitOK || errs.Len() > 0 {
		t.Fatalf("%d, %q", code, errs.String())
	}
	harness.SameFlags(t, help.String(), "testdata/cgmanager.8.md")
}
