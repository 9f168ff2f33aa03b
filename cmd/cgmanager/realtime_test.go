package main

import (
	"fmt"
	"io"
	"strconv"
	"testing"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
)

// rtkit's flags have its defaults and its ranges, in which a number may be written as
// strtol(3) reads it.
func TestRealtimeFlags(t *testing.T) {
	f := pflag.NewFlagSet("cgmanager", pflag.ContinueOnError)
	new(realtimeOptions).add(f)
	const none = -100 // there is no upper bound that anybody reaches
	for _, c := range []struct {
		name            string
		value, low, top int64
		other           string // what its bound needs
	}{
		{"our-realtime-priority", 21, 2, 99, "--max-realtime-priority=1"},
		{"our-nice-level", 1, -20, 19, ""},
		{"max-realtime-priority", 20, 1, 98, "--our-realtime-priority=99"},
		{"max-realtime-priority", 20, 1, 20, ""},
		{"min-nice-level", -15, -20, 19, ""},
		{"rttime-usec-max", 200000, 1, none, ""},
		{"users-max", 2048, 1, none, ""},
		{"processes-per-user-max", 15, 1, none, ""},
		{"threads-per-user-max", 25, 1, none, ""},
		{"actions-burst-sec", 20, 1, none, ""},
		{"actions-per-burst-max", 25, 1, none, ""},
		{"canary-cheep-msec", 5000, 1, 9999, ""},
		{"canary-watchdog-msec", 10000, 5001, none, ""},
		{"canary-refuse-sec", 300, 0, none, ""},
	} {
		if got := f.Lookup(c.name).Value.String(); got != strconv.FormatInt(c.value, 10) {
			t.Errorf("--%s is %s if not given, want %d", c.name, got, c.value)
		}
		try := func(value string, want bool) {
			t.Helper()
			args := []string{"--" + c.name + "=" + value}
			if c.other != "" {
				args = append(args, c.other)
			}
			if _, _, err := parse(args, io.Discard); (err == nil) != want {
				t.Errorf("%q: %v", args, err)
			}
		}
		top := c.top
		if top == none {
			top = 1e9
		} else {
			try(fmt.Sprint(top+1), false)
		}
		try(fmt.Sprint(c.low), true)
		try(fmt.Sprint(c.low-1), false)
		try(fmt.Sprint(top), true)
		try(fmt.Sprintf("%#x", top), true)
		try(fmt.Sprintf("%#o", top), true)
		for _, bad := range []string{"", "x", "1 ", "1.5", "1_0", "99999999999999999999"} {
			try(bad, false)
		}
	}
	for name, want := range map[string]int32{"RR": unix.SCHED_RR, "rr": unix.SCHED_RR, "FIFO": unix.SCHED_FIFO, "Fifo": unix.SCHED_FIFO, "other": -1, "": -1} {
		o, _, err := parse([]string{"--scheduling-policy=" + name}, io.Discard)
		if (err == nil) != (want >= 0) || err == nil && o.grants.Scheduling != want {
			t.Errorf("--scheduling-policy=%s: %v, want %d", name, err, want)
		}
	}
	o, _, err := parse([]string{
		"--canary-demote-root", "--canary-demote-unknown", "--no-canary",
		"--no-drop-privileges", "--no-chroot", "--no-limit-resources", "--stderr", "--user-name=nobody",
	}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if w := o.grants.Watchdog; !w.DemoteRoot || !w.DemoteUnknown || !w.NoCanary {
		t.Errorf("%+v", w)
	}
	if o, _, err := parse(nil, io.Discard); err != nil || o.grants.Scheduling != unix.SCHED_RR || o.grants.Watchdog.DemoteRoot ||
		o.grants.Watchdog.DemoteUnknown || o.grants.Watchdog.NoCanary {
		t.Errorf("if nothing is given: %+v, %v", o.grants, err)
	}
}
