// Package service is what the programs that serve sockets have in common:
// their log, their exit status, going to the background and ending in order.
package service

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/sirupsen/logrus"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"cgmanager/api/server"
)

// Exit codes.
const (
	ExitOK      = 0
	ExitFailure = 1
	ExitUsage   = 2
)

// Where clients look for the socket, on a host as in a container. What is below
// CgroupDir can be there where that is a tmpfs, or something is mounted there.
const (
	SocketName = "sock"
	RunDir     = "/run/cgmanager"
	RunSocket  = RunDir + "/" + SocketName

	CgroupDir    = "/sys/fs/cgroup"
	SeedSocket   = CgroupDir + "/manager"
	LegacyDir    = CgroupDir + "/cgmanager"
	LegacySocket = LegacyDir + "/" + SocketName
)

// FlagUsages describes the flags as --help does, in the order in which they were
// added: what belongs together stands together.
func FlagUsages(f *pflag.FlagSet) string {
	f.SortFlags = false
	return f.FlagUsagesWrapped(helpWidth)
}

// helpWidth is that of a wide terminal, in columns.
const helpWidth = 120

// newLog returns a log that writes to stderr. The level is one that
// logrus.ParseLevel knows.
func newLog(stderr io.Writer, level string) *logrus.Logger {
	log := logrus.New()
	log.SetOutput(stderr)
	if l, err := logrus.ParseLevel(level); err == nil {
		log.SetLevel(l)
	}
	// A service manager puts times on the lines itself.
	log.SetFormatter(&logrus.TextFormatter{DisableColors: true, DisableTimestamp: os.Getenv("JOURNAL_STREAM") != "", FullTimestamp: true})
	return log
}

// Prepare sets the process up for serving.
func Prepare() {
	// One processor: a request is a handful of short system calls, and handing
	// it from the event loop to a worker costs least without a second thread to
	// wake. A worker that waits in the kernel does not hold up the others.
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(1)
	}
	// The heap that lives is small, and so is what a request leaves behind: a
	// collection is cheap, and memory that waits for one is not.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(25)
	}
	syscall.Umask(0o022) // modes of cgroups and sockets do not depend on who started us
	if inBackground() {
		awaitInit()
		// By this name service managers know it again. It is "exe" by how it
		// was started.
		_ = os.WriteFile("/proc/self/comm", []byte(filepath.Base(os.Args[0])), 0)
	}
}

// SocketPath is the path of a D-Bus address of a Unix socket; a bare path is
// accepted too.
func SocketPath(address string) (string, error) {
	path := strings.TrimPrefix(address, "unix:path=")
	if !filepath.IsAbs(path) || strings.ContainsAny(path, ",;") {
		return "", fmt.Errorf("%q: not an address of the form unix:path=/PATH", address)
	}
	return filepath.Clean(path), nil
}

// SocketDir makes the directory of a socket, which others bind-mount.
func SocketDir(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("socket directory: %w", err)
	}
	st, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("socket directory: %w", err)
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); !ok || !st.IsDir() || sys.Uid != 0 || st.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("socket directory %s: must be a directory that root alone can write to", dir)
	}
	// The umask may have taken from it.
	if err := os.Chmod(dir, 0o755); err != nil {
		return fmt.Errorf("socket directory: %w", err)
	}
	return nil
}

// Life is a context that the first of the signals ends: SIGTERM and SIGINT ask the
// program to end in order. A second one ends it at once.
func Life(log *logrus.Logger) context.Context {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		log.WithField("signal", (<-signals).String()).Info("ending")
		Notify(daemon.SdNotifyStopping)
		cancel()
		<-signals
		os.Exit(ExitFailure)
	}()
	return ctx
}

// Notify tells a service manager that asked for it (sd_notify(3)).
func Notify(state string) {
	// Who does not listen misses it, and that is all.
	_, _ = daemon.SdNotify(false, state)
}

// Ready tells whoever waits for it that the sockets are there: the log, a service
// manager, the process that went to the background where background is set, and,
// where sigstop is, a supervisor that waits for the process to stop.
func Ready(background, sigstop bool, listeners []*server.Listener, log *logrus.Logger) {
	for _, l := range listeners {
		log.WithField("socket", l.Name()).Info("serving")
	}
	Notify(daemon.SdNotifyReady)
	if background {
		f := os.NewFile(readyFD, "ready")
		_, _ = f.Write([]byte{1})
		_ = f.Close()
		// Whoever started us may close its terminal.
		if null, err := os.OpenFile("/dev/null", os.O_RDWR, 0); err == nil {
			_ = unix.Dup2(int(null.Fd()), 0)
			_ = unix.Dup2(int(null.Fd()), 1)
			_ = null.Close()
		}
	}
	if sigstop {
		_ = unix.Kill(os.Getpid(), unix.SIGSTOP)
	}
}

// backgroundEnv tells a process what it is: betweenProgram is the one that ends once
// it has started the one in the background, which it tells its own number. So that
// one is a child of init's, which a service manager can wait for. readyFD is where
// it says that it serves.
const (
	backgroundEnv  = "CGMANAGER_BACKGROUND"
	betweenProgram = "between"
	readyFD        = 3
)

// Run is a service's life: in the background where background is set, with a log to
// stderr. It returns the exit code.
func Run(background bool, level string, stderr io.Writer, serve func(*logrus.Logger) error) int {
	if background && !inBackground() {
		return startBackground(stderr)
	}
	log := newLog(stderr, level)
	if err := serve(log); err != nil {
		log.Error(err)
		return ExitFailure
	}
	return ExitOK
}

// startBackground starts the program again in a session of its own and waits until
// it serves, or has failed.
func startBackground(stderr io.Writer) int {
	if os.Getenv(backgroundEnv) == betweenProgram {
		if err := again(strconv.Itoa(os.Getpid()), os.NewFile(readyFD, "ready")).Start(); err != nil {
			return failed(stderr, err)
		}
		return ExitOK
	}
	r, w, err := os.Pipe()
	if err != nil {
		return failed(stderr, err)
	}
	if err := again(betweenProgram, w).Run(); err != nil {
		return failed(stderr, err)
	}
	_ = w.Close()
	var b [1]byte
	if n, _ := r.Read(b[:]); n == 1 {
		return ExitOK
	}
	return ExitFailure // it has said why
}

func failed(stderr io.Writer, err error) int {
	fmt.Fprintf(stderr, "%s: going to the background: %v\n", filepath.Base(os.Args[0]), err)
	return ExitFailure
}

// again is this program once more, as what.
func again(what string, ready *os.File) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), backgroundEnv+"="+what)
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{ready}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd
}

// inBackground reports whether this process is the one that startBackground started.
func inBackground() bool {
	what := os.Getenv(backgroundEnv)
	return what != "" && what != betweenProgram
}

// awaitInit waits until the process that started this one has ended.
func awaitInit() {
	for range 2000 {
		if strconv.Itoa(os.Getppid()) != os.Getenv(backgroundEnv) {
			return
		}
		time.Sleep(time.Millisecond)
	}
}
