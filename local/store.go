package local

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/openfaas/faas-provider/types"
)

// store is the folder in which a provider keeps what it shall know again:
// a file for each function and for each secret. Nobody else can read it.
type store struct {
	dir  string // absolute
	lock *os.File
}

// Folders of a store.
const (
	functionsFolder = "functions"
	secretsFolder   = "secrets"
	mountsFolder    = "mounts"   // a folder for each replica that has secrets, while it lives
	imagesFolder    = "images"   // a file for each image that was built
	programsFolder  = "programs" // what they are made of
	buildsFolder    = "builds"   // a folder for each build, while it runs
	natsFolder      = "nats"
)

// openStore opens the folder for this process alone, and makes it if need be.
func openStore(dir string) (_ *store, err error) {
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	s := &store{dir: dir}
	if s.lock, err = os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	// A process that is being started, between fork and exec, holds for a moment
	// what its parent held, and may have given back.
	err = syscall.Flock(int(s.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	for end := time.Now().Add(time.Second); err == syscall.EWOULDBLOCK && time.Now().Before(end); {
		time.Sleep(20 * time.Millisecond)
		err = syscall.Flock(int(s.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	}
	if err != nil {
		return nil, fmt.Errorf("folder %s is in use by another stack: %w", dir, err)
	}
	// Replicas and builds of a stack that was killed have left theirs.
	for _, folder := range []string{mountsFolder, buildsFolder} {
		if err := os.RemoveAll(filepath.Join(dir, folder)); err != nil {
			return nil, err
		}
	}
	for _, folder := range []string{functionsFolder, secretsFolder, mountsFolder, imagesFolder, programsFolder, buildsFolder} {
		folder = filepath.Join(dir, folder)
		if err := os.Mkdir(folder, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
		if err := os.Chmod(folder, 0o700); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// close lets another process open the folder.
func (s *store) close() { _ = s.lock.Close() } // it was not written to

// path is where a file is; the name has been checked to be no path.
func (s *store) path(folder, name string) string { return filepath.Join(s.dir, folder, name) }

// write makes or replaces a file: a reader, and a next process, see all of the
// old content or all of the new.
func (s *store) write(folder, name string, data []byte) (err error) {
	f, err := os.CreateTemp(filepath.Join(s.dir, folder), ".new-*") // 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name()) // the first error counts
		}
	}()
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), s.path(folder, name))
}

// makeSecret makes a file with a random secret, unless it is there. It is not
// synced: when it is lost, another one is made.
func (s *store) makeSecret(name string) error {
	path := s.path("", name)
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(rand.Text() + "\n")
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// names lists the files of a folder in order, without what a process that was
// killed was about to write.
func (s *store) names(folder string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(s.dir, folder))
	if err != nil {
		return nil, err
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// remove takes a file away; that it is not there is no error.
func (s *store) remove(folder, name string) error {
	if err := os.Remove(s.path(folder, name)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// kept is the file of a function.
type kept struct {
	CreatedAt time.Time                `json:"createdAt"`
	Spec      types.FunctionDeployment `json:"spec"`
	// Replicas is how many it shall have; nil means as many as its labels ask
	// for at least.
	Replicas *int `json:"replicas,omitempty"`
}

const functionFile = ".json" // ends the name of a function's file

// functions reads all functions that are kept.
func (s *store) functions() ([]kept, error) {
	names, err := s.names(functionsFolder)
	if err != nil {
		return nil, err
	}
	var all []kept
	for _, name := range names {
		path := s.path(functionsFolder, name)
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		var k kept
		if err = json.Unmarshal(data, &k); err == nil {
			if bad := checkName(k.Spec.Service); bad != nil {
				err = bad
			} else if k.Spec.Service+functionFile != name {
				err = fmt.Errorf("it is of function %q", k.Spec.Service)
			} else {
				_, _, err = bounds(k.Spec)
			}
			if n := k.Replicas; err == nil && n != nil && (*n < 0 || *n > MaxReplicas) {
				err = fmt.Errorf("it wants %d replicas, and may want from 0 to %d", *n, MaxReplicas)
			}
		}
		if err != nil {
			return nil, fmt.Errorf("the file %s is damaged; mend it, or remove it and deploy the function again: %w", path, err)
		}
		all = append(all, k)
	}
	return all, nil
}

func (s *store) keepFunction(k kept) error {
	data, err := json.MarshalIndent(k, "", "  ")
	if err != nil {
		return err
	}
	return s.write(functionsFolder, k.Spec.Service+functionFile, append(data, '\n'))
}

// restore starts the functions that are kept, each with as many replicas as it
// had, or shall have at least.
func (p *Provider) restore() error {
	all, err := p.store.functions()
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, k := range all {
		p.set(k)
	}
	return nil
}
