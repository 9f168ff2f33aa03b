package manager

import (
	"errors"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/cgfs"
	"cgmanager/privcheck"
)

// Chown implements api.CGManager1.
func (m *Manager) Chown(rq *api.Request, name string, uid, gid uint32) (err error) {
	c, err := m.begin("Chown", rq)
	if err != nil {
		return err
	}
	defer c.end(&err)
	places, err := c.existing(name)
	if err != nil {
		return err
	}
	return c.chown(places, quote(name), api.Owner{UID: uid, GID: gid})
}

// newOwner is an owner in the daemon's own numbers; unmapped says that the
// request named one that the requestor's user namespace does not map.
type newOwner struct {
	uid, gid uint32
	unmapped bool
}

func (c *call) translateOwner(o api.Owner) newOwner {
	n := newOwner{uid: o.UID, gid: o.GID}
	if o.Host {
		return n
	}
	r := c.r().r
	if o.UID != api.NoID {
		var ok bool
		if n.uid, ok = r.UIDs.ToOutside(o.UID); !ok {
			n.unmapped = true
		}
	}
	if o.GID != api.NoID {
		var ok bool
		if n.gid, ok = r.GIDs.ToOutside(o.GID); !ok {
			n.unmapped = true
		}
	}
	return n
}

// owned is a directory or file whose owner can be changed.
type owned interface {
	Attr() (cgfs.Attr, error)
	SetOwner(uid, gid uint32) error
}

// chown gives the places and their files of delegation to o, all or nothing.
func (c *call) chown(places []*place, subject string, o api.Owner) error {
	to := c.translateOwner(o)
	type change struct {
		what     owned
		subject  string
		decision privcheck.Decision
	}
	var changes []change
	for _, p := range places {
		d, err := c.decide(in(subject, p.h), func(who *party) privcheck.Decision {
			return privcheck.Chown(who.r, p.of(who), to.uid, to.gid, to.unmapped)
		})
		if err != nil {
			return err
		}
		changes = append(changes, change{p.dir, in(subject, p.h), d})
		for _, name := range p.h.DelegationFiles() {
			f, o, err := c.file(p, name, cgfs.ForFacts)
			if errors.Is(err, unix.ENOENT) {
				continue
			}
			if err != nil {
				return c.kernel(in(subject, p.h), err)
			}
			question := func(who *party) privcheck.Decision {
				return privcheck.ChownFile(who.r, p.of(who), o, to.uid, to.gid, to.unmapped)
			}
			if !overTasks(name) && !c.entitled(question) {
				continue
			}
			d, err := c.decide(in(subject, p.h), question)
			if err != nil {
				return err
			}
			changes = append(changes, change{f, in(subject, p.h), d})
		}
	}
	var u undo
	defer u.run()
	for _, p := range places {
		c.leafFollows(p, &u)
	}
	for _, ch := range changes {
		if !ch.decision.Allowed() {
			return api.Errorf(api.Denied, "%s %s: not decided", c.op, ch.subject)
		}
		before, err := ch.what.Attr()
		if err == nil {
			err = ch.what.SetOwner(to.uid, to.gid)
		}
		if err != nil {
			return c.kernel(ch.subject, err)
		}
		u.add(func() {
			if err := ch.what.SetOwner(before.UID, before.GID); err != nil {
				c.m.log.WithFields(logrus.Fields{"op": c.op, "target": ch.subject}).WithError(err).Error("undo of a change of owner failed")
			}
		})
	}
	for _, p := range places {
		if err := p.dir.MirrorLeaf(); err != nil {
			return c.kernel(in(subject, p.h), err)
		}
	}
	u.release()
	for _, p := range places {
		c.done(subject, p.h, changes[0].decision)
	}
	return nil
}

// chmod changes the mode of a file of each place, or of its directory.
func (c *call) chmod(places []*place, subject, file string, mode int32) error {
	type target interface {
		Attr() (cgfs.Attr, error)
		SetMode(mode uint32) error
	}
	var u undo
	defer u.run()
	type change struct {
		what     target
		decision privcheck.Decision
		h        *cgfs.Hierarchy
	}
	var changes []change
	for _, p := range places {
		var what target = p.dir
		o := p.object()
		if file != "" {
			f, fo, err := c.file(p, p.h.FileName(file), cgfs.ForFacts)
			if err != nil {
				return c.kernel(in(subject, p.h), err)
			}
			what, o = f, fo
		}
		d, err := c.decide(in(subject, p.h), func(who *party) privcheck.Decision {
			return privcheck.Chmod(who.r, p.of(who), o, uint32(mode))
		})
		if err != nil {
			return err
		}
		changes = append(changes, change{what, d, p.h})
	}
	for _, ch := range changes {
		if !ch.decision.Allowed() {
			return api.Errorf(api.Denied, "%s %s: not decided", c.op, subject)
		}
		before, err := ch.what.Attr()
		if err == nil {
			err = ch.what.SetMode(uint32(mode))
		}
		if err != nil {
			return c.kernel(in(subject, ch.h), err)
		}
		u.add(func() {
			if err := ch.what.SetMode(before.Mode & 0o7777); err != nil {
				c.m.log.WithFields(logrus.Fields{"op": c.op, "target": subject}).WithError(err).Error("undo of a change of mode failed")
			}
		})
		c.done(subject, ch.h, ch.decision)
	}
	u.release()
	return nil
}

// leafFollows has the files of a hidden leaf follow those of p back where what
// comes after it is undone.
func (c *call) leafFollows(p *place, u *undo) {
	u.add(func() {
		if err := p.dir.MirrorLeaf(); err != nil {
			c.m.log.WithFields(logrus.Fields{"op": c.op}).WithError(err).Error("undo of a change of owner failed")
		}
	})
}
