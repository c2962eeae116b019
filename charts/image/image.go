// Package image makes container images of Go commands without a container
// engine: FROM scratch, for several platforms, and the same to the byte
// whenever and wherever they are made from the same source by the same Go.
//
// An image holds one static binary, the certificates of public authorities, an
// empty /tmp, and nothing else: no shell, no package manager, no user database.
package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/distribution/reference"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

// User is who runs in the images: nobody that a node knows, and never root.
const User = "65532:65532"

// A Command is a Go command to make an image of.
type Command struct {
	Dir     string            // of the module that is built; "" means the working directory
	Package string            // as go build takes it, such as ./functions/worker
	Name    string            // of the binary in the image, at the root: "worker" is /worker
	Args    []string          // that the image gives the binary; usually none
	Env     map[string]string // that the image gives the binary
	Tags    string            // of the build, separated by commas; usually none
	Version string            // written on the image as its label; "" means none
	Ports   []int             // that it listens at, as far as the image tells
}

// Platforms are those that sheaf's images are made for.
func Platforms() []v1.Platform {
	return []v1.Platform{{OS: "linux", Architecture: "amd64"}, {OS: "linux", Architecture: "arm64"}}
}

// Build compiles the command for each platform and returns an index of the
// images, one for each.
func Build(ctx context.Context, c Command, platforms []v1.Platform) (v1.ImageIndex, error) {
	if len(platforms) == 0 {
		return nil, errors.New("build an image: no platform is given; name at least one, such as linux/amd64")
	}
	dir, err := os.MkdirTemp("", "sheaf-image-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, p := range platforms {
		binary := filepath.Join(dir, p.OS+"-"+p.Architecture)
		if err := compile(ctx, c, p, binary); err != nil {
			return nil, err
		}
		img, err := from(c, p, binary)
		if err != nil {
			return nil, fmt.Errorf("image of %s for %s: %w", c.Name, p.String(), err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &p}})
	}
	return index, nil
}

// compile builds a static binary that holds no path and no time of this
// machine.
func compile(ctx context.Context, c Command, p v1.Platform, out string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-tags", c.Tags, "-ldflags", "-s -w -buildid=", "-o", out, c.Package)
	cmd.Dir = c.Dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOOS="+p.OS, "GOARCH="+p.Architecture)
	if said, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s for %s: %w\n%s", c.Package, p.String(), err, said)
	}
	return nil
}

// from makes the image of one platform.
func from(c Command, p v1.Platform, binary string) (v1.Image, error) {
	program, err := os.ReadFile(binary)
	if err != nil {
		return nil, err
	}
	// Certificates first: that layer is the same in all images, and is stored once.
	base, err := layer(
		file{name: "etc/", mode: 0o755}, file{name: "etc/ssl/", mode: 0o755}, file{name: "etc/ssl/certs/", mode: 0o755},
		file{name: "etc/ssl/certs/ca-certificates.crt", mode: 0o644, data: certificates()},
		file{name: "tmp/", mode: 0o1777},
	)
	if err != nil {
		return nil, err
	}
	top, err := layer(file{name: c.Name, mode: 0o755, data: program})
	if err != nil {
		return nil, err
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	if img, err = mutate.AppendLayers(img, base, top); err != nil {
		return nil, err
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture = p.OS, p.Architecture
	cf.Created = v1.Time{Time: time.Unix(0, 0).UTC()}
	cf.Config = v1.Config{
		User: User, WorkingDir: "/", Entrypoint: []string{"/" + c.Name}, Cmd: c.Args,
		Labels: map[string]string{"org.opencontainers.image.title": c.Name, "org.opencontainers.image.licenses": "MIT"},
	}
	if c.Version != "" {
		cf.Config.Labels["org.opencontainers.image.version"] = c.Version
	}
	for _, k := range slices.Sorted(maps.Keys(c.Env)) {
		cf.Config.Env = append(cf.Config.Env, k+"="+c.Env[k])
	}
	for _, port := range c.Ports {
		if cf.Config.ExposedPorts == nil {
			cf.Config.ExposedPorts = map[string]struct{}{}
		}
		cf.Config.ExposedPorts[fmt.Sprintf("%d/tcp", port)] = struct{}{}
	}
	return mutate.ConfigFile(img, cf)
}

// certificates are those of the public authorities, as a PEM bundle: a pinned
// module's, not this machine's.
func certificates() []byte {
	var b bytes.Buffer
	for c := range bundle.Roots() {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate}) // a Buffer takes all
	}
	return b.Bytes()
}

// A file is an entry of a layer; a name that ends in "/" is a folder.
type file struct {
	name string
	mode int64
	data []byte
}

// layer packs files, all of root and of the year 1970, with a gzip that does
// not tell when.
func layer(files ...file) (v1.Layer, error) {
	var b bytes.Buffer
	if err := pack(&b, files...); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil },
		tarball.WithMediaType(types.OCILayer))
}

func pack(out io.Writer, files ...file) error {
	w := tar.NewWriter(out)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: f.mode, Size: int64(len(f.data)), ModTime: time.Unix(0, 0), Typeflag: tar.TypeReg}
		if strings.HasSuffix(f.name, "/") {
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		if _, err := w.Write(f.data); err != nil {
			return err
		}
	}
	return w.Close()
}

// Save writes an index as the OCI layout dir, and as the archive dir + ".tar"
// that containerd, podman and others import. ref is the image's name, such as
// sheaf/worker:latest. What was there before is replaced.
func Save(index v1.ImageIndex, dir, ref string) error {
	name, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return fmt.Errorf("%q is not the name of an image, such as sheaf/worker:latest: %w", ref, err)
	}
	tagged, ok := reference.TagNameOnly(name).(reference.Tagged)
	if !ok {
		return fmt.Errorf("%q names an image by its digest; give a tag", ref)
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		return fmt.Errorf("write the layout of %s: %w", ref, err)
	}
	if err := p.AppendIndex(index, layout.WithAnnotations(map[string]string{
		"io.containerd.image.name":          tagged.String(),
		"org.opencontainers.image.ref.name": tagged.Tag(),
	})); err != nil {
		return fmt.Errorf("write the layout of %s: %w", ref, err)
	}
	var files []file
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		name := filepath.ToSlash(strings.TrimPrefix(path, dir+string(filepath.Separator)))
		if d.IsDir() {
			files = append(files, file{name: name + "/", mode: 0o755})
			return nil
		}
		data, err := os.ReadFile(path)
		files = append(files, file{name: name, mode: 0o644, data: data})
		return err
	})
	if err != nil {
		return fmt.Errorf("read the layout of %s: %w", ref, err)
	}
	out, err := os.Create(dir + ".tar")
	if err != nil {
		return err
	}
	return errors.Join(pack(out, files...), out.Close())
}
