package cgfs

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// deviceProgramName tells the daemon's programs from those of others, in
// whichever life of the daemon they were attached.
const deviceProgramName = "cgmanager_dev"

// instructions is the program that asks the policy: it gets a struct
// bpf_cgroup_dev_ctx (linux/bpf.h) and answers 1 to allow. The kernel asks
// those of all cgroups above as well, and each must allow.
func (p devicePolicy) instructions() asm.Instructions {
	const differs, kind, access, major, minor, one = asm.R1, asm.R2, asm.R3, asm.R4, asm.R5, asm.R6
	is := asm.Instructions{
		asm.LoadMem(kind, asm.R1, 0, asm.Word),
		asm.Mov.Reg32(access, kind),
		asm.And.Imm32(kind, 0xffff),
		asm.RSh.Imm32(access, 16),
		asm.LoadMem(major, asm.R1, 4, asm.Word),
		asm.LoadMem(minor, asm.R1, 8, asm.Word),
	}
	answer := func(yes bool) asm.Instruction {
		if yes {
			return asm.Mov.Imm(asm.R0, 1)
		}
		return asm.Mov.Imm(asm.R0, 0)
	}
	label := ""
	add := func(i asm.Instruction) {
		if label != "" {
			i, label = i.WithSymbol(label), ""
		}
		is = append(is, i)
	}
	for i, e := range p.exceptions {
		next := "exception" + strconv.Itoa(i+1)
		code := int32(unix.BPF_DEVCG_DEV_CHAR)
		if e.kind == 'b' {
			code = unix.BPF_DEVCG_DEV_BLOCK
		}
		// What differs is gathered first and asked for once: the kernel takes
		// time for a program by the square of its branches.
		add(asm.Mov.Reg32(differs, kind))
		add(asm.Xor.Imm32(differs, code))
		gather := func(is ...asm.Instruction) {
			for _, i := range is {
				add(i)
			}
			add(asm.Or.Reg32(differs, one))
		}
		if e.major != anyNumber {
			gather(asm.Mov.Reg32(one, major), asm.Xor.Imm32(one, int32(e.major)))
		}
		if e.minor != anyNumber {
			gather(asm.Mov.Reg32(one, minor), asm.Xor.Imm32(one, int32(e.minor)))
		}
		if !p.allow {
			gather(asm.Mov.Reg32(one, access), asm.And.Imm32(one, ^int32(e.access)))
		}
		add(asm.JNE.Imm32(differs, 0, next))
		if p.allow {
			// Whoever wants to read and write is refused where one of both is.
			add(asm.Mov.Reg32(one, access))
			add(asm.And.Imm32(one, int32(e.access)))
			add(asm.JEq.Imm32(one, 0, next))
		}
		add(answer(!p.allow))
		add(asm.Return())
		label = next
	}
	add(answer(p.allow))
	add(asm.Return())
	return is
}

// load hands the program to the kernel. The caller closes it; where it is
// attached it stays.
func (p devicePolicy) load() (*ebpf.Program, error) {
	raiseMemlock()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: deviceProgramName, Type: ebpf.CGroupDevice, License: "Apache-2.0",
		Instructions: p.instructions(),
	})
	return prog, deviceProgramError("load", err)
}

// raiseMemlock lifts the bound of locked memory, to which Linux before 5.11
// charges programs, those of all daemons of the host's root together.
var raiseMemlock = sync.OnceFunc(func() {
	_ = unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY})
})

// deviceProgramError keeps what the kernel has against a program from being
// taken for an answer about the devices.
func deviceProgramError(op string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.E2BIG):
		return fmt.Errorf("%w: too many device programs, or too long a one", ErrTooBig)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS),
		errors.Is(err, ebpf.ErrNotSupported):
		return fmt.Errorf("%w: the kernel refuses to %s a device program (%v)", ErrUnsupported, op, err) //nolint:errorlint // not of this cgroup's rules
	}
	return fmt.Errorf("%s a device program: %w", op, err)
}

// attachDevices puts prog in the place of the daemon's program at d, at once,
// and leaves those of others where they are.
func (d *Dir) attachDevices(prog *ebpf.Program) (err error) {
	ours, err := d.ourPrograms()
	if err != nil {
		return err
	}
	defer func() {
		for _, p := range ours {
			err = errors.Join(err, p.Close())
		}
	}()
	o := link.RawAttachProgramOptions{
		Target: d.fd, Program: prog, Attach: ebpf.AttachCGroupDevice, Flags: unix.BPF_F_ALLOW_MULTI,
	}
	if len(ours) > 0 {
		o.Anchor = link.ReplaceProgram(ours[0])
	}
	return deviceProgramError("attach", link.RawAttachProgram(o))
}

// ourPrograms returns the daemon's programs at d: one, or none.
func (d *Dir) ourPrograms() (ours []*ebpf.Program, err error) {
	ids, _, err := d.devicePrograms()
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		p, err := ebpf.NewProgramFromID(id)
		if err != nil {
			continue // it went meanwhile, or a security module hides it: not ours
		}
		info, err := p.Info()
		if err == nil && info.Name == deviceProgramName {
			// A container that was given a BPF token can load programs too.
			if uid, ok := info.CreatedByUID(); ok && uid == 0 && len(ours) == 0 {
				ours = append(ours, p)
				continue
			}
		}
		_ = p.Close()
	}
	return ours, nil
}

// nests returns an error wrapping ErrUnsupported if somebody else's program at
// d would not be asked any more once a cgroup below had one: only those that
// were attached with BPF_F_ALLOW_MULTI are.
func (d *Dir) nests() error {
	ids, flags, err := d.devicePrograms()
	if err == nil && len(ids) > 0 && flags&unix.BPF_F_ALLOW_MULTI == 0 {
		err = fmt.Errorf("%w: another manager's device rules, on this cgroup or on one above it, bind none that has rules of its own", ErrUnsupported)
	}
	return err
}

// maxDevicePrograms is BPF_CGROUP_MAX_PROGS of linux/bpf-cgroup.h.
const maxDevicePrograms = 64

// devicePrograms asks for the device programs at d, and for the flags that they
// have in common (BPF_PROG_QUERY, bpf(2)). The library does not tell the flags.
func (d *Dir) devicePrograms() (ids []ebpf.ProgramID, flags uint32, err error) {
	var found [maxDevicePrograms]uint32
	// All of the query's part of union bpf_attr: Linux 6.17 writes its last
	// field whatever size it is told.
	attr := struct {
		target, attachType, queryFlags, attachFlags uint32
		ids                                         uint64
		count, _                                    uint32
		programFlags, linkIDs, linkFlags, revision  uint64
	}{target: uint32(d.fd), attachType: uint32(ebpf.AttachCGroupDevice), count: maxDevicePrograms}
	var pin runtime.Pinner // attr has the address as a number
	defer pin.Unpin()
	pin.Pin(&found)
	attr.ids = uint64(uintptr(unsafe.Pointer(&found)))
	for range maxAgain {
		_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_QUERY, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return nil, 0, deviceProgramError("query", os.NewSyscallError("bpf", errno))
		}
		for _, id := range found[:min(attr.count, maxDevicePrograms)] {
			ids = append(ids, ebpf.ProgramID(id))
		}
		return ids, attr.attachFlags, nil
	}
	return nil, 0, unix.EINTR
}
