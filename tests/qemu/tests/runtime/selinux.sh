# An engine on a kernel with SELinux: a policy under which a container may write what is labelled as its own alone.
. /oci/steps.sh

mount -t selinuxfs none /sys/fs/selinux
dd if=/oci/policy of=/sys/fs/selinux/load bs=1M 2> /dev/null
echo 1 > /sys/fs/selinux/enforce
step enforcing 1 cat /sys/fs/selinux/enforce
own_label() { tr -d '\0' < /proc/self/attr/current; }
step policy_is_loaded system_u:system_r:kernel_t:s0 own_label

bundle plain
step without_labels "system_u:system_r:kernel_t:s0
written" oci run plain
bundle labelled
step labels 'system_u:system_r:container_t:s0:c1,c2
/dev context="system_u:object_r:container_file_t:s0:c1,c2"
/dev/pts context="system_u:object_r:container_file_t:s0:c1,c2"
/dev/shm context="system_u:object_r:container_file_t:s0:c1,c2"
/secret context="system_u:object_r:container_file_t:s0:c1,c2"
written
queue
refused
1' oci run labelled

bundle sleeps
oci create --bundle /oci/bundle sleeps > /dev/null 2>&1
oci start sleeps
step sleeps running wait_for sleeps running
step exec_is_labelled "system_u:system_r:container_t:s0:c1,c2" in_use sleeps '/bin/busybox tr -d "\0" < /proc/self/attr/current'
step delete 0 code oci delete --force sleeps

step no_such_label 1 told no_label 'security label (system_u:system_r:nobody_t:s0): .*does not know this label'
step no_such_mount_label 1 told no_mount_label 'mounts (tmpfs at /dev): Invalid argument'
step apparmor_is_off 1 told profile 'process.apparmorProfile: no AppArmor in this kernel.*CONFIG_SECURITY_APPARMOR'

echo "all steps are done"
poweroff -f
