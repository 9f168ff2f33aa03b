package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/api/bus"
	"cgmanager/manager"
)

// systemBus is the manager, which serves RealtimeKit1 on the system's bus too, from
// start on and until somebody asks for its Exit.
type systemBus struct {
	*manager.Manager
	log *logrus.Logger

	mu     sync.Mutex
	cancel context.CancelFunc // guarded by mu; nil where it is not served
	ended  chan struct{}      // closed once it is served no more; guarded by mu
	err    error              // of bus.Serve; not read before that
}

// start serves until ctx ends, if it is not served yet.
func (b *systemBus) start(ctx context.Context) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.cancel != nil {
		return
	}
	before, ended := b.ended, make(chan struct{})
	ctx, b.cancel = context.WithCancel(ctx)
	b.ended = ended
	go func() {
		defer close(ended)
		if before != nil {
			<-before
		}
		if b.err = bus.Serve(ctx, bus.Config{Backend: b, Log: b.log}); b.err != nil {
			b.log.WithError(b.err).Error("--system-bus")
		}
	}()
}

// Exit implements api.RealtimeKit1: the name on the bus is given up, too.
func (b *systemBus) Exit(rq *api.Request) error {
	err := b.Manager.Exit(rq)
	if err == nil {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.cancel != nil {
			b.cancel() // who has asked is answered first
			b.cancel = nil
		}
	}
	return err
}

// wait returns how it ended once the context of start has.
func (b *systemBus) wait() error {
	b.mu.Lock()
	ended := b.ended
	b.mu.Unlock()
	if ended == nil {
		return nil
	}
	<-ended
	return b.err
}

// wake tells the daemon that runs, if there is one, that the bus wants the name to be
// served again.
func wake(stateDir string) (running bool, err error) {
	f, err := os.Open(filepath.Join(stateDir, "lock"))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("state directory: %w", err)
	}
	defer f.Close()
	pid := holder(f)
	if pid == 0 {
		return false, nil
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return false, os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(pidfd)
	if holder(f) != pid {
		return false, errors.New("the daemon is being replaced (hint: ask again)")
	}
	return true, os.NewSyscallError("pidfd_send_signal", unix.PidfdSendSignal(pidfd, unix.SIGUSR1, nil, 0))
}
