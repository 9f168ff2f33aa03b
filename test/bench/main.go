package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

// options are the command line's.
type options struct {
	daemon   string
	proxy    string
	level    string
	conns    []int
	only     string
	rounds   int
	slice    time.Duration
	idle     time.Duration
	idlePeer int
}

func main() {
	if len(os.Args) == 3 && os.Args[1] == echoArg {
		echo(os.Args[2])
		return
	}
	o := options{conns: []int{1, 8, 64}}
	flag.StringVar(&o.daemon, "daemon", "build/cgmanager", "`path` of the daemon")
	flag.StringVar(&o.proxy, "proxy", "build/cgproxy", "`path` of the proxy; empty: measure none")
	flag.StringVar(&o.level, "log-level", "info", "the daemon's; its log goes to a file")
	flag.StringVar(&o.only, "only", "", "measure the requests whose `name` contains this")
	flag.IntVar(&o.rounds, "rounds", 5, "rounds of which a figure is the median")
	flag.DurationVar(&o.slice, "slice", 400*time.Millisecond, "how long each round loads the daemon with one kind of request")
	flag.DurationVar(&o.idle, "idle", time.Minute, "how long to watch the idle daemon, and with its watchdog; 0: not at all")
	flag.IntVar(&o.idlePeer, "idle-connections", 1000, "how many idle connections to open")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o, os.Stdout); err != nil {
		stop()
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options, w io.Writer) (err error) {
	debug.SetGCPercent(-1) // the client is bounded in time; it allocates little
	if o.rounds < 1 {
		return errors.New("-rounds: at least 1")
	}
	cg, err := enterCgroup()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cg.leave()) }()
	d, err := startDaemon(ctx, o.daemon, o.level)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.stop()) }()
	e, err := startEcho(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.stop()) }()

	started, err := d.rss()
	if err != nil {
		return err
	}
	idle, err := idleConnections(d, o.idlePeer)
	if err != nil {
		return err
	}
	fresh, err := d.rss()
	idle.close()
	if err != nil {
		return err
	}
	if err := table(ctx, o, w, d, e, cg); err != nil {
		return err
	}
	if err := memory(ctx, o, w, d, started, fresh); err != nil {
		return err
	}
	if err := watched(ctx, o, w, d); err != nil || o.proxy == "" {
		return err
	}
	return proxyTable(ctx, o, w, d, cg)
}

// memory prints what the daemon holds now, beside what it held at first, and how
// often it wakes up with idle connections.
func memory(ctx context.Context, o options, w io.Writer, d *daemon, started, fresh int64) error {
	idle, err := idleConnections(d, o.idlePeer)
	if err != nil {
		return err
	}
	defer idle.close()
	later, err := d.rss()
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "\nRSS: %.1f MB started, %.1f MB with %d idle connections, %.1f MB with as many after the load\n",
		megabytes(started), megabytes(fresh), o.idlePeer, megabytes(later))
	if o.idle == 0 {
		return nil
	}
	idling, err := wakeUps(ctx, o.idle, d.pid())
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "wake-ups while idle: %.1f a minute\n", idling)
	return nil
}

func megabytes(n int64) float64 { return float64(n) / (1 << 20) }

// cell is what was measured of one request at one number of connections.
type cell struct{ rate, p50, p99, cpu, floor []float64 }

// table measures all requests and prints a row for each.
func table(ctx context.Context, o options, w io.Writer, d *daemon, e *server, cg *cgroup) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw, "request\tconnections\trequests/s\tp50 µs\tp99 µs\tCPU µs\tfloor\tCPU µs\tratio\tRSS MB\t")
	for _, r := range requests(cg) {
		if !strings.Contains(strings.ToLower(r.name), strings.ToLower(o.only)) {
			continue
		}
		for _, conns := range o.conns {
			var c cell
			for range o.rounds {
				if err := c.round(ctx, o, r, conns, d, e, cg); err != nil {
					return fmt.Errorf("%s, %d connections: %w", r.name, conns, err)
				}
			}
			rss, err := d.rss()
			if err != nil {
				return err
			}
			cpu, floor := median(c.cpu), median(c.floor)
			fmt.Fprintf(tw, "%s\t%d\t%.0f\t%.1f\t%.1f\t%.1f\t%s\t%.1f\t%.1f\t%.1f\t\n", r.name, conns, median(c.rate),
				median(c.p50), median(c.p99), cpu, r.floorName, floor, cpu/floor, megabytes(rss))
		}
	}
	return tw.Flush()
}

// round measures the request's floor and then the request.
func (c *cell) round(ctx context.Context, o options, r *request, conns int, d *daemon, e *server, cg *cgroup) error {
	if err := cg.settle(); err != nil {
		return err
	}
	slice := o.slice / 4
	l := &load{conns: conns, path: e.path, plain: true, request: &request{calls: [][]byte{make([]byte, len(r.calls[0]))}, reconnect: r.reconnect}}
	echo, err := l.run(ctx, []int{e.pid()}, slice)
	if err != nil {
		return fmt.Errorf("echo: %w", err)
	}
	floor := echo.cpu
	if r.floor != nil {
		own, err := r.floor(cg, slice)
		if err != nil {
			return fmt.Errorf("floor: %w", err)
		}
		floor += own
	}
	if err := c.load(ctx, o, r, conns, d.path, []int{d.pid()}); err != nil {
		return err
	}
	c.floor = append(c.floor, floor)
	return nil
}

// load measures the request at a socket; the processes are those that serve it.
func (c *cell) load(ctx context.Context, o options, r *request, conns int, path string, pids []int) error {
	victims, err := r.spawn(ctx, conns)
	if err != nil {
		return err
	}
	defer victims.end()
	got, err := (&load{conns: conns, path: path, request: r, victims: victims}).run(ctx, pids, o.slice)
	if err != nil {
		return err
	}
	c.rate = append(c.rate, got.rate)
	c.p50 = append(c.p50, got.p50)
	c.p99 = append(c.p99, got.p99)
	c.cpu = append(c.cpu, got.cpu)
	return nil
}

// connections are logged in and silent.
type connections []*conn

func idleConnections(d *daemon, n int) (cs connections, err error) {
	for range n {
		c, err := dial(d.path, false)
		if err == nil {
			cs = append(cs, c)
			err = c.login()
		}
		if err != nil {
			cs.close()
			return nil, fmt.Errorf("idle connection %d: %w", len(cs), err)
		}
	}
	return cs, nil
}

func (cs connections) close() {
	for _, c := range cs {
		c.close()
	}
}

// settle is how long the daemon takes to come to rest: its own deadlines are
// of 10 s, and the runtime gives memory back that the load has left.
const settle = 15 * time.Second

// wakeUps counts how often processes run while nobody asks them anything.
func wakeUps(ctx context.Context, d time.Duration, pids ...int) (aMinute float64, err error) {
	if err := sleep(ctx, settle); err != nil {
		return 0, err
	}
	before, err := switches(pids...)
	if err != nil {
		return 0, err
	}
	if err := sleep(ctx, d); err != nil {
		return 0, err
	}
	after, err := switches(pids...)
	return float64(after-before) / d.Minutes(), err
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}
