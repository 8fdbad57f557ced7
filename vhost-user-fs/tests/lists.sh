# Access control lists by the tools that people use, and locks that are waited for. `outcome NAME RESULT` is the suite's.
shown() { getfacl -cnp "$1" 2>&1 | grep . | tr '\n' ','; }
: > by-tool
setfacl -m u:1234:rw,g:77:r by-tool
outcome setfacl "$(shown by-tool)"
chmod g-w by-tool
outcome setfacl-chmod "$(shown by-tool) $(stat -c %a by-tool)"
cp -p by-tool copied
outcome setfacl-copied "$(shown copied)"
setfacl -x u:1234 by-tool
outcome setfacl-without "$(shown by-tool)"
mkdir lists
setfacl -d -m u:1234:rwx,o::- lists
: > lists/new
mkdir lists/sub
for name in lists lists/new lists/sub; do outcome "setfacl-default-$name" "$(shown $name) $(stat -c %a $name)"; done
getfacl -nR lists > saved
setfacl -Rb lists
outcome setfacl-none "$(shown lists) $(shown lists/new)"
setfacl --restore=saved
outcome setfacl-restored "$(shown lists) $(shown lists/new) $(shown lists/sub)"
# Who waits gets the lock after it is given back, whoever else is busy meanwhile.
flock held sh -c 'echo has > state; while ! [ -e busy ]; do :; done; echo gave >> state' &
until [ -e state ]; do :; done
flock held sh -c 'echo got >> state' &
mkdir other && echo x > other/file && : > busy
wait
outcome flock-waits "$(tr '\n' ' ' < state)"
