package main

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"cgmanager/manager/rt"
	"cgmanager/manager/rt/watchdog"
)

// realtimeOptions are rtkit's, with its names, defaults and ranges.
type realtimeOptions struct {
	scheduling               string
	ourPriority, maxPriority int64
	ourNice, minNice         int64
	rttime                   int64
	users, processes         int64
	threads                  int64
	burst, actions           int64
	cheep, watch, refuse     int64
	demoteRoot               bool
	demoteUnknown            bool
	noCanary                 bool
	policy                   string
	introspect               bool
}

// number is a flag that reads as strtol(3) does with base 0: 0x10 and 020 are 16.
type number struct {
	to       *int64
	low, max int64
}

func (n number) String() string {
	if n.to == nil {
		return "0" // of the zero value, which pflag asks for
	}
	return strconv.FormatInt(*n.to, 10)
}

func (number) Type() string { return "N" } // as --help names it

func (n number) Set(s string) error {
	v, err := strconv.ParseInt(s, 0, 64)
	if err != nil || strings.Contains(s, "_") {
		return errors.New("not a number")
	}
	if v < n.low || v > n.max {
		if n.max == many {
			return fmt.Errorf("must be at least %d", n.low)
		}
		return fmt.Errorf("must be %d to %d", n.low, n.max)
	}
	*n.to = v
	return nil
}

// many is no bound that anybody reaches; times of so many seconds can be told.
const many = math.MaxInt32

func (o *realtimeOptions) add(f *pflag.FlagSet) {
	add := func(to *int64, name string, value, low, high int64, usage string) {
		*to = value
		f.Var(number{to, low, high}, name, usage)
	}
	f.StringVar(&o.policy, "realtime-policy", "/etc/cgmanager/realtime.toml", "who is granted realtime: cgmanager-realtime.toml(5); a `FILE` that is missing says nothing")
	f.StringVar(&o.scheduling, "scheduling-policy", "RR", "what rtkit's clients are given where the file does not say: `RR or FIFO`")
	add(&o.maxPriority, "max-realtime-priority", 20, 1, 99, "highest priority where the file does not say; below --our-realtime-priority")
	add(&o.minNice, "min-nice-level", -15, -20, 19, "lowest nice level where the file does not say")
	add(&o.rttime, "rttime-usec-max", 200000, 1, many, "highest hard RLIMIT_RTTIME with which a process is granted realtime, in microseconds")
	add(&o.users, "users-max", 2048, 1, many, "how many users may have grants")
	add(&o.processes, "processes-per-user-max", 15, 1, many, "how many processes of a user, or of a container, may have grants")
	add(&o.threads, "threads-per-user-max", 25, 1, many, "how many threads of a user, or of a container, may have grants")
	add(&o.actions, "actions-per-burst-max", 25, 1, many, "how many requests of a user, or of a container, are granted in --actions-burst-sec")
	add(&o.burst, "actions-burst-sec", 20, 1, many, "the time over which requests are counted, in seconds")
	add(&o.cheep, "canary-cheep-msec", 5000, 1, many, "how often the canary gives a sign, in milliseconds")
	add(&o.watch, "canary-watchdog-msec", 10000, 1, many, "for how long the canary may give no sign before threads are demoted, and the time over which each thread's share of a CPU is counted, in milliseconds")
	add(&o.refuse, "canary-refuse-sec", 300, 0, many, "for how long whoever had a thread that took too much is refused, and everybody after a starvation, in seconds")
	f.BoolVar(&o.demoteUnknown, "canary-demote-unknown", false, "where the canary starves, demote threads too that were granted nothing here")
	f.BoolVar(&o.demoteRoot, "canary-demote-root", false, "where the canary starves, demote root's threads too")
	f.BoolVar(&o.noCanary, "no-canary", false, "grant with nobody to keep watch")
	f.BoolVar(&o.introspect, "introspect", false, "print rtkit's D-Bus interface as XML, and end")
	add(&o.ourPriority, "our-realtime-priority", 21, 1, 99, "--max-realtime-priority has to be below it; the daemon itself is never realtime")
	const accepted = "accepted for rtkit's old command lines"
	add(&o.ourNice, "our-nice-level", 1, -20, 19, accepted)
	f.String("user-name", "rtkit", accepted+": no user `NAME` is needed")
	for _, name := range []string{"no-drop-privileges", "no-chroot", "no-limit-resources", "stderr"} {
		f.Bool(name, false, accepted)
	}
}

// config is what the options mean for the daemon with the state directory.
func (o *realtimeOptions) config(state string) (*rt.Config, error) {
	if o.maxPriority >= o.ourPriority {
		return nil, fmt.Errorf("--max-realtime-priority %d: must be below --our-realtime-priority, which is %d", o.maxPriority, o.ourPriority)
	}
	if o.cheep >= o.watch {
		return nil, fmt.Errorf("--canary-cheep-msec %d: must be below --canary-watchdog-msec, which is %d", o.cheep, o.watch)
	}
	c := &rt.Config{
		MaxPriority: int32(o.maxPriority), MinNice: int32(o.minNice), RTTimeMax: uint64(o.rttime),
		Limits: rt.Limits{
			Users: int(o.users), Processes: int(o.processes), Threads: int(o.threads),
			Actions: int(o.actions), Burst: time.Duration(o.burst) * time.Second, Refuse: time.Duration(o.refuse) * time.Second,
			Total: maxGrants(),
		},
		Watchdog: watchdog.Config{
			Cheep: time.Duration(o.cheep) * time.Millisecond, Period: time.Duration(o.watch) * time.Millisecond,
			DemoteRoot: o.demoteRoot, DemoteUnknown: o.demoteUnknown, NoCanary: o.noCanary,
		},
		PolicyFile: o.policy, State: state,
	}
	switch strings.ToUpper(o.scheduling) {
	case "RR":
		c.Scheduling = unix.SCHED_RR
	case "FIFO":
		c.Scheduling = unix.SCHED_FIFO
	default:
		return nil, fmt.Errorf("--scheduling-policy %q: RR or FIFO", o.scheduling)
	}
	return c, nil
}

// realtimeFiles is the part of the descriptors that is for grants, which need one
// each: one in so many. api/server leaves an eighth for all that is not its own.
const realtimeFiles = 16

// maxGrants bounds the grants by what there are descriptors for, and by what can be
// watched.
func maxGrants() int {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return 64
	}
	return int(min(max(r.Max/realtimeFiles, 64), watchdog.MaxWatched))
}
